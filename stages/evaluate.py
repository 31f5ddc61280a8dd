"""Stage 7, evaluate: train a head on the bags of one encoder and score it once on test slides.

    reads   data/cohort                     labels, patients, splits
            data/embed/<encoder>            one bag per slide
    writes  data/evaluate/<encoder>/<head>  metrics.json, predictions.csv, roc.csv, attention.csv

Run it with `dvc repro evaluate`; its settings are the `evaluate` section of params.yaml. Epoch,
strength and threshold come from the validation slides; test slides are scored at the very end.
"""

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from stages.common import metrics, params, plugins, run
from stages.common.bags import LabelledBags, load_splits
from stages.heads import Head

logger = logging.getLogger(__name__)

ROC = ["fpr", "tpr", "threshold"]


@dataclass(frozen=True)
class EvaluateParams:
    """Section evaluate of params.yaml; each head has a section of its own inside."""

    heads: tuple[str, ...]  # files of stages/heads; each is a cell of the matrix in dvc.yaml
    seeds: int  # runs that differ in initialisation and order of the bags

    def __post_init__(self) -> None:
        """Reject a count that has no spread."""
        if self.seeds < 2:
            raise ValueError(
                f"evaluate.seeds is {self.seeds}: it must be 2 or more, the spread is reported"
            )


@dataclass(frozen=True)
class Fitted:
    """A trained head and the threshold that validation gave it."""

    seed: int
    head: Head
    threshold: float


def main(
    cohort: Path,
    bags: Path,
    target: Path,
    build: Callable[[int, int], Head],
    settings: EvaluateParams,
    seed: int,
) -> None:
    """Fit on train and validation slides, then score the test slides and write the results.

    Args:
        cohort: Folder of the cohort stage.
        bags: Folder of the embed stage, of one encoder.
        target: Folder to write to.
        build: Makes an untrained head from (numbers in an embedding, classes).
        settings: Section evaluate.
        seed: The first seed.

    Raises:
        FileNotFoundError: the cohort or a bag is missing.
        ValueError: labels or embeddings cannot be evaluated, see `stages.common.bags`.
    """
    torch.set_num_threads(1)  # heads are small: threads cost more than they save, and reorder sums
    splits = load_splits(cohort, bags)
    fits = []
    for at in range(seed, seed + settings.seeds):
        fits.append(fit(build, splits["train"], splits["val"], at))
        logger.info("%s: seed %d is trained, threshold %.3f", target, at, fits[-1].threshold)
    score_once(target, fits, splits)


def fit(
    build: Callable[[int, int], Head], train: LabelledBags, val: LabelledBags, seed: int
) -> Fitted:
    """Train one head and choose its threshold; test slides have no way in here."""
    head = build(train.bags[0].shape[1], 2)
    head.fit(train.bags, train.labels, val.bags, val.labels, seed)
    probability, _ = head.predict(val.bags)
    return Fitted(seed, head, metrics.threshold_from(val.labels, probability[:, 1]))


def score_once(target: Path, fits: list[Fitted], splits: dict[str, LabelledBags]) -> None:
    """Predict every slide with every seed's head, score the test slides, write the four files."""
    predicted = [
        {split: fitted.head.predict(part.bags) for split, part in splits.items()} for fitted in fits
    ]
    labels = splits["test"].labels
    probabilities = [of_seed["test"][0][:, 1] for of_seed in predicted]
    runs = [
        metrics.score(labels, probability, fitted.threshold)
        for probability, fitted in zip(probabilities, fits, strict=True)
    ]
    counts = {split: len(part.bags) for split, part in splits.items()}
    run.write_metrics(target / "metrics.json", {**metrics.spread(runs), "slides": counts})
    rows = [
        _predictions(fitted, split, part, of_seed[split][0])
        for fitted, of_seed in zip(fits, predicted, strict=True)
        for split, part in splits.items()
    ]
    _write_csv(target / "predictions.csv", pd.concat(rows))
    curve = pd.DataFrame(metrics.mean_roc(labels, probabilities), columns=ROC)
    _write_csv(target / "roc.csv", curve)
    attention = [of_seed["test"][1] for of_seed in predicted]
    _write_csv(target / "attention.csv", _attention(splits["test"].slide_id, attention))


def _predictions(
    fitted: Fitted, split: str, part: LabelledBags, probability: Float64[np.ndarray, "slide 2"]
) -> pd.DataFrame:
    """One row a slide; class 1 is called where probability reaches threshold."""
    columns = {"slide_id": part.slide_id, "patient": part.patient, "split": split}
    columns |= {"seed": fitted.seed, "probability": probability[:, 1]}
    return pd.DataFrame(columns | {"label": part.labels, "threshold": fitted.threshold})


def _attention(
    slide_ids: list[str], runs: list[list[Float64[np.ndarray, " instance"]]]
) -> pd.DataFrame:
    """Attention on each patch, averaged over the seeds; sums to 1 for a slide."""
    means = [np.mean(of_slide, axis=0) for of_slide in zip(*runs, strict=True)]
    lengths = [len(mean) for mean in means]
    columns = {
        "slide_id": np.repeat(np.array(slide_ids, dtype=object), lengths),
        "patch": np.concatenate([np.arange(length) for length in lengths]),
        "attention": np.concatenate(means),
    }
    return pd.DataFrame(columns)


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with run.atomic(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def command() -> None:
    """`python -m stages.evaluate <encoder> <head>`: the names of one cell of the matrix."""
    if len(sys.argv) != 3:
        raise ValueError(f"evaluate got {sys.argv[1:]}: give an encoder and a head")
    encoder, head = sys.argv[1:]
    module = plugins.load("heads", head)
    build = functools.partial(module.build, params=params.load(module.Params, f"evaluate.{head}"))
    settings = params.load(EvaluateParams, "evaluate")
    data = Path("data")
    target = data / "evaluate" / encoder / head
    seed = params.load(params.Top).seed
    main(data / "cohort", data / "embed" / encoder, target, build, settings, seed)


if __name__ == "__main__":
    run.start(command)
