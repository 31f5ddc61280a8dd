"""The predictions of one encoder and head, as arrays: what every figure of merit starts from."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

SPLIT_KEYS = ["repeat", "fold"]


@dataclass(frozen=True)
class Scores:
    """The slides of one part of one split, with what each seed's head says of them."""

    repeat: int
    fold: int
    slide_id: np.ndarray  # [slide], sorted
    patient: np.ndarray  # [slide]
    label: Int64[np.ndarray, " slide"]  # index of the class
    probability: Float64[np.ndarray, "seed slide classes"]
    threshold: (
        Float64[np.ndarray, " seed"] | None
    )  # on class 1; None: the likeliest class is called
    temperature: Float64[np.ndarray, " seed"]

    def called(self) -> Int64[np.ndarray, "seed slide"]:
        """The class that each seed's head calls."""
        if self.threshold is None:
            return self.probability.argmax(2)
        return (self.probability[..., 1] >= self.threshold[:, None]).astype(np.int64)

    def ensemble(self) -> "Scores":
        """The mean probability over the seeds, called at the mean of their thresholds."""
        threshold = None if self.threshold is None else self.threshold.mean(keepdims=True)
        return Scores(
            *(self.repeat, self.fold, self.slide_id, self.patient, self.label),
            *(self.probability.mean(0, keepdims=True), threshold, np.ones(1)),
        )


def of_part(predictions: pd.DataFrame, classes: int, part: str = "test") -> list[Scores]:
    """The scores of `part` for every (repeat, fold), in order.

    Args:
        predictions: The columns of predictions.parquet: slide_id, patient, repeat, fold, split,
            seed, label, temperature, probability_0 and so on, and for two classes threshold.
        classes: How many there are.
        part: train, val or test.

    Raises:
        ValueError: there are no such slides, a probability is not one, a threshold or temperature
            is not finite, seeds of a split saw different slides, or a slide stands twice.
    """
    found = predictions[predictions.split == part]
    if found.empty:
        raise ValueError(f"the predictions have no slide of the part {part}: run `dvc repro split`")
    columns = [f"probability_{at}" for at in range(classes)]
    _check_probabilities(found, columns)
    return [_scores(keys, rows, columns) for keys, rows in found.groupby(SPLIT_KEYS, sort=True)]


def _scores(keys: tuple[int, int], rows: pd.DataFrame, columns: list[str]) -> Scores:
    rows = rows.sort_values(["seed", "slide_id"], kind="stable")
    seeds = rows.seed.nunique()
    slides = rows.slide_id.to_numpy(dtype=object).reshape(seeds, -1) if _is_grid(rows) else None
    if slides is None or (slides != slides[0]).any() or len(set(slides[0])) < slides.shape[1]:
        raise ValueError(
            f"the {rows.split.iloc[0]} slides of repeat {keys[0]}, fold {keys[1]} are not the same "
            f"{rows.slide_id.nunique()} slides, each once, for all {seeds} seeds: rerun `dvc repro "
            "evaluate`"
        )
    firsts = rows.iloc[: slides.shape[1]]
    binary = len(columns) == 2
    return Scores(
        *(int(key) for key in keys),
        slides[0],
        firsts.patient.to_numpy(dtype=object),
        firsts.label.to_numpy(np.int64),
        rows[columns].to_numpy(np.float64).reshape(seeds, -1, len(columns)),
        _of_seeds(rows, "threshold") if binary else None,
        _of_seeds(rows, "temperature"),
    )


def _is_grid(rows: pd.DataFrame) -> bool:
    return rows.groupby("seed").size().nunique() == 1


def _of_seeds(rows: pd.DataFrame, name: str) -> Float64[np.ndarray, " seed"]:
    values = rows.groupby("seed", sort=True)[name].first().to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"the {name} of repeat {rows.repeat.iloc[0]}, fold {rows.fold.iloc[0]} is "
            f"{values.tolist()} for its seeds: it must be finite; rerun `dvc repro evaluate`"
        )
    return values


def _check_probabilities(rows: pd.DataFrame, columns: list[str]) -> None:
    values = rows[columns].to_numpy(np.float64)
    wrong = ~(np.isfinite(values).all(1) & (values >= 0).all(1) & np.isclose(values.sum(1), 1))
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"slide {rows.slide_id.iloc[at]} has the probabilities {values[at].tolist()}: they "
            "must be finite, 0 or more, and sum to 1; rerun `dvc repro evaluate`"
        )
