"""Views in pairs, benign and other in turn, for the method that learns from labels of slides."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from stages.common import cohort
from stages.common.viewset import ViewSet


class PairedViews(ViewSet):
    """The views of train slides, two classes; other slides are not opened.

    Args:
        data: Folder that holds the results of the cohort, tile and perturb stages.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: there are not two classes, or a class has no view.
    """

    def __init__(self, data: Path) -> None:
        classes = cohort.read_classes(data / "cohort")
        if len(classes) != 2:
            raise ValueError(
                f"pretrain.method vpu learns from two classes, and the cohort has {len(classes)} "
                f"({', '.join(classes)}): merge labels, or take another method"
            )
        label = {
            row.slide_id: row.label
            for row in cohort.read_rows(data / "cohort")
            if row.split == "train"
        }
        super().__init__(data / "perturb", data / "tile", set(label))
        counts = [len(store) for store in self.stores]
        of_row = np.repeat([label[name] for name in self.slide_ids], counts)
        self.kinds = [np.flatnonzero(of_row == name) for name in classes]
        for name, rows in zip(classes, self.kinds, strict=True):
            if not len(rows):
                raise ValueError(
                    f"no view in {data / 'perturb'} is of a train slide of class {name}: "
                    "pretrain.method vpu needs both; add slides, or patches (tile)"
                )
        labels = "\n".join(f"{name} {label[name]}" for name in self.slide_ids)
        self.digest = hashlib.sha256(f"{self.digest}\n{classes}\n{labels}".encode()).hexdigest()

    def order(self, seed: int, epoch: int) -> Int64[np.ndarray, " row"]:
        """Benign and other in turn; of the rarer kind patches come several times an epoch."""
        rng = np.random.default_rng([seed % 2**64, epoch])
        pairs = len(self) // 2
        return np.stack([_drawn(rows, pairs, rng) for rows in self.kinds], axis=1).reshape(-1)


def _drawn(
    rows: Int64[np.ndarray, " row"], count: int, rng: np.random.Generator
) -> Int64[np.ndarray, " count"]:
    rounds = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(rounds)])[:count]
