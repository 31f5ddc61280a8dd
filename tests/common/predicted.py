"""Predictions as evaluate writes them, drawn from normal scores."""

import numpy as np
import pandas as pd


def predictions(
    slides: int = 60,
    repeats: int = 1,
    folds: int = 1,
    seeds: int = 3,
    classes: int = 2,
    signal: float = 1.5,
    per_patient: int = 1,
    noise: float = 0.5,
    at: int = 0,
    encoder: int = 0,
) -> pd.DataFrame:
    """Slides whose class scores `signal` higher, in a holdout or in repeated folds.

    `at` seeds slides and splits, `encoder` the scores.
    """
    draw = np.random.default_rng([at, 0])
    own = np.random.default_rng([at, 1, encoder])
    label = np.arange(slides) // per_patient % classes
    patient = np.arange(slides) // per_patient
    base = own.normal(size=(slides, classes))
    base[np.arange(slides), label] += signal
    tables = []
    for repeat in range(repeats):
        place = _places(draw, patient.max() + 1, classes)[patient]
        for fold in range(folds):
            part = _parts(place, fold, folds)
            for seed in range(seeds):
                table = {
                    "slide_id": [f"s{number:04d}" for number in range(slides)],
                    "patient": [f"p{number:04d}" for number in patient],
                    "repeat": repeat,
                    "fold": fold,
                    "split": part,
                    "seed": seed,
                    "label": label,
                    "temperature": 1.0 + 0.25 * seed,
                }
                score = base + noise * own.normal(size=base.shape)
                share = np.exp(score) / np.exp(score).sum(1, keepdims=True)
                columns = {f"probability_{number}": share[:, number] for number in range(classes)}
                threshold = {"threshold": 0.4 + 0.05 * seed} if classes == 2 else {}
                tables.append(pd.DataFrame(table | threshold | columns))
    return pd.concat(tables, ignore_index=True)


def _places(draw: np.random.Generator, patients: int, classes: int) -> np.ndarray:
    """A number for each patient, from 0 within its class: parts get as many of each class."""
    places = np.empty(patients, np.int64)
    for at in range(classes):
        places[at::classes] = draw.permutation(len(places[at::classes]))
    return places


def _parts(place: np.ndarray, fold: int, folds: int) -> np.ndarray:
    if folds == 1:
        turn, shares = place % 10, {"test": (0, 1, 2), "val": (3, 4)}
    else:
        turn, shares = place % folds, {"test": (fold,), "val": ((fold + 1) % folds,)}
    parts = np.full(len(place), "train", dtype=object)
    for name, turns in shares.items():
        parts[np.isin(turn, turns)] = name
    return parts
