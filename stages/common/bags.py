"""The labelled bags of a cohort, checked where they enter: what evaluation may rely on."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from stages.common import cohort, stores
from stages.common.cohort import SlideRow


@dataclass(frozen=True)
class LabelledBags:
    """Slides of one split, in the order of cohort.csv."""

    slide_id: list[str]
    patient: list[str]
    bags: list[Float32[np.ndarray, "instance dim"]]
    labels: Int64[np.ndarray, " slide"]  # 0 or 1; 1 is the positive class, last in classes.json


def load_splits(source: Path, bags: Path) -> dict[str, LabelledBags]:
    """Labels and embeddings of every slide by split: train, val, test.

    Args:
        source: Folder with cohort.csv and classes.json.
        bags: Folder with <slide_id>/bag.zarr, of one encoder.

    Raises:
        FileNotFoundError: the cohort or a bag is missing.
        ValueError: there are not two classes, a split lacks one, a patient is in two splits, or
            embeddings are absent, not finite, constant or of different widths.
    """
    rows, classes = cohort.read_rows(source), cohort.read_classes(source)
    if len(classes) != 2:
        raise ValueError(
            f"the cohort has {len(classes)} classes ({', '.join(classes)}): evaluation needs two; "
            "merge labels or leave slides out"
        )
    _check_patients(rows)
    _check_classes(rows, classes)
    embeddings = dict(zip(rows, _load_bags(bags, [row.slide_id for row in rows]), strict=True))
    by_split = {split: [row for row in rows if row.split == split] for split in cohort.SPLITS}
    return {
        split: LabelledBags(
            [row.slide_id for row in chosen],
            [row.patient for row in chosen],
            [embeddings[row] for row in chosen],
            np.array([classes.index(row.label) for row in chosen], dtype=np.int64),
        )
        for split, chosen in by_split.items()
    }


def _check_patients(rows: list[SlideRow]) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.patient].add(row.split)
    if len(splits) == 1:
        raise ValueError(
            f"all slides are of one patient, {rows[0].patient}: train, val and test need different "
            "ones; add patients, or fill in who the slides are of"
        )
    for patient, found in splits.items():
        if len(found) > 1:
            raise ValueError(
                f"patient {patient} is in the splits {', '.join(sorted(found))}: a patient must be "
                "in one; rerun `dvc repro cohort`"
            )


def _check_classes(rows: list[SlideRow], classes: list[str]) -> None:
    present = {(row.split, row.label) for row in rows}
    for split in cohort.SPLITS:
        for label in classes:
            if (split, label) not in present:
                raise ValueError(
                    f"split {split} has no slide of class {label}: every split needs both; add "
                    "patients of that class, or set the column split"
                )


def _load_bags(folder: Path, slide_ids: list[str]) -> list[Float32[np.ndarray, "instance dim"]]:
    bags = []
    for slide_id in slide_ids:
        path = folder / slide_id / "bag.zarr"
        if not path.is_dir():
            raise FileNotFoundError(
                f"slide {slide_id} has no bag at {path}: run `dvc repro` for the stage embed"
            )
        bag = stores.open_bag(path).embedding
        _check_bag(slide_id, bag, bags[0] if bags else bag, slide_ids[0])
        bags.append(bag)
    _check_collapse(np.concatenate(bags), f"all embeddings in {folder}")
    return bags


def _check_bag(slide_id: str, bag: np.ndarray, first: np.ndarray, first_id: str) -> None:
    if len(bag) == 0:
        raise ValueError(
            f"slide {slide_id} has no patches: leave it out of the cohort or loosen tile's choice"
        )
    if bag.shape[1] != first.shape[1]:
        raise ValueError(
            f"slide {slide_id} has embeddings of {bag.shape[1]} numbers, slide {first_id} of "
            f"{first.shape[1]}: they must come from one encoder; rerun the stage embed"
        )
    broken = ~np.isfinite(bag).all(axis=1)
    if broken.any():
        raise ValueError(
            f"slide {slide_id} has NaN or infinity in the embedding of patch {broken.argmax()} "
            f"({broken.sum()} of {len(bag)} patches): they must be finite; retrain or embed again"
        )
    if len(bag) > 1:
        _check_collapse(bag, f"the {len(bag)} embeddings of slide {slide_id}")


def _check_collapse(embedding: Float32[np.ndarray, "instance dim"], what: str) -> None:
    # Identical inputs pass through different batches with rounding errors of about 1e-7.
    largest = np.abs(embedding).max()
    if np.ptp(embedding, axis=0).max() <= 1e-6 * largest:
        raise ValueError(
            f"{what} are equal: they must differ; look at the patches in data/tile, and if those "
            "differ the encoder has collapsed: change pretrain and train again"
        )
