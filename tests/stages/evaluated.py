"""A small cohort with its splits and bags, for the tests of evaluate."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stages import evaluate
from stages.common import cohort, splits, stores
from stages.common.cohort import SlideRow

DIM = 5
FILES = {
    *("metrics.json", "predictions.parquet", "attention.parquet", "split.json"),
    *(f"{name}.csv" for name in ("roc", "pr", "calibration", "confusion")),
}
TRAINING = {
    **{"epochs": 7, "patience": 7, "batch": 4, "learning_rate": 5e-3, "weight_decay": 1e-4},
    **{"betas": [0.9, 0.999], "optimizer": "adam", "schedule": "constant", "warmup_epochs": 0.0},
    **{"clip": 0.0, "balanced": False, "select": "loss", "standardise": True},
}
LESS = {"project": True, "dims": [8, 8], "heads": 2, "depths": [1, 1], "stages": 1, "mlp_ratio": 2}
HEADS = {
    "abmil": {"variant": "gated", "width": 11, "attention_width": 7, "training": TRAINING},
    "meanpool": {"strengths": [0.1, 1.0]},
    "less": {**LESS, "training": TRAINING},
}
COUNTS = {"train": 14, "val": 7, "test": 9}


def rows_of(counts: dict[str, int], labels: tuple[str, ...] = ("well", "ill")) -> list[SlideRow]:
    """Slides of all classes in turn, one patient each."""
    names = [(split, at) for split, count in counts.items() for at in range(count)]
    return [
        SlideRow(f"{split}-{at}", "", labels[at % len(labels)], f"p-{split}-{at}", split, "0.5", "")
        for split, at in names
    ]


def write_bag(folder: Path, slide_id: str, embedding: np.ndarray, crop: bool = False) -> None:
    (folder / slide_id).mkdir(parents=True)
    attributes = {"slide_id": slide_id, "mpp": 0.5, "slide_mpp": 0.5, "input": "x"}
    origin = np.zeros((len(embedding), 2), np.int64)
    half = embedding[::-1] if crop else None
    stores.create_bag(folder / slide_id / "bag.zarr", embedding, origin, attributes, half)


def embedding_of(row: SlideRow) -> np.ndarray:
    rng = np.random.default_rng(list(row.slide_id.encode()))
    embedding = rng.normal(size=(rng.integers(2, 7), DIM))
    return (embedding + (row.label == "ill")).astype(np.float32)


class Laboratory:
    """A folder with a cohort, bags of one encoder and params, where evaluate runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = folder / "data"
        self.bags = self.data / "embed" / "enc"
        self.rows = rows_of(COUNTS)
        self.classes = ["well", "ill"]
        (self.data / "cohort").mkdir(parents=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("CYTOSSL_CACHE", str(folder / "cache"))

    def write_bags(self, crop: bool = False) -> None:
        for row in self.rows:
            write_bag(self.bags, row.slide_id, embedding_of(row), crop)

    def rewrite_bag(self, slide_id: str, embedding: np.ndarray) -> None:
        (self.bags / slide_id).rename(self.data / f"old-{slide_id}")
        write_bag(self.bags, slide_id, embedding)

    def split(self, table: pd.DataFrame | None = None, protocol: str = "holdout") -> None:
        """Write classes and splits; without a table those of the cohort."""
        cohort.write_rows(self.data / "cohort", self.rows, self.classes)
        found = splits.holdout(self.rows, protocol == splits.OPTIMISTIC) if table is None else table
        splits.write(self.data / "split", found, protocol)

    def settings(self, **changes: object) -> None:
        section = {"heads": list(HEADS), "seeds": 2, "sanity": False, **changes, **HEADS}
        values = {"seed": 40, "sparse_topk": 0, "irpe": "none", "evaluate": section}
        values["engine"] = {"workers": 2, "scheduler": ""}
        Path("params.yaml").write_text(yaml.safe_dump(values))

    def run(self, head: str = "meanpool") -> Path:
        evaluate.main("enc", head)
        return self.data / "evaluate" / "enc" / head


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "predictions.parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
