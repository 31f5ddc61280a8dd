"""Stage 8, evaluate: what the bags of one encoder are worth to one head.

    reads   data/cohort/classes.json, data/split, data/embed/<encoder>
    writes  data/evaluate/<encoder>/<head>/
              metrics.json         every figure, flat; `stages.common.metrics` names them
              predictions.parquet  slide_id, patient, repeat, fold, split, seed, label,
                                   probability_<class>, threshold (two classes), temperature,
                                   protocol
              attention.parquet    slide_id, repeat, fold, patch, attention; of test slides, mean
                                   over the seeds
              roc.csv, pr.csv, calibration.csv, confusion.csv
              split.json           protocol, and digest of the splits

Run it with `dvc repro evaluate`; its settings are the `evaluate` section of params.yaml. A fit is
a split with a seed; fits run in parallel and each is kept, so that a killed run goes on. Epoch,
strength, threshold and temperature come from validation slides: a fit has no test labels
(`stages.common.fits.Fit`). Under the protocol paper_optimistic test slides are given as validation
slides too, the epoch and the threshold with the best accuracy on them are taken, as much of the
field does, and every figure's name begins with `optimistic_`.
"""

import dataclasses
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.common import (
    bags,
    cohort,
    fits,
    merits,
    metrics,
    params,
    perslide,
    plugins,
    run,
    sanity,
)
from stages.common import splits as made_splits
from stages.common.fits import PARTS, Fit
from stages.common.splits import KEYS, OPTIMISTIC, Splits

logger = logging.getLogger(__name__)

PREDICTED = ["slide_id", "patient", *KEYS, "split", "seed", "label"]  # then what the fit says


@dataclass(frozen=True)
class EvaluateParams:
    """Section evaluate of params.yaml; each head has a section of its own inside."""

    heads: tuple[str, ...]  # files of stages/heads; each is a cell of the matrix in dvc.yaml
    seeds: int  # fits of a split that differ in initialisation and order of the bags
    sanity: bool  # on the first split also fit permuted labels, and random features

    def __post_init__(self) -> None:
        """Reject a count that fits nothing."""
        if self.seeds < 1:
            raise ValueError(
                f"evaluate.seeds is {self.seeds}: it must be 1 or more; from 2 on the spread is "
                "reported"
            )


def main(
    encoder: str,
    head: str,
    data: Path = Path("data"),
    settings_file: Path = Path("params.yaml"),
) -> None:
    """Make the fits of one cell of the matrix, score their test slides and write the files.

    Args:
        encoder: A folder of data/embed.
        head: A file of stages/heads.
        data: Folder of all stages.
        settings_file: The params.

    Raises:
        FileNotFoundError: the splits, the classes or a bag are missing.
        ValueError: labels, splits or embeddings cannot be evaluated, or fits failed.
    """
    settings = params.load(EvaluateParams, "evaluate", settings_file)
    split = made_splits.read(data / "split")
    classes = cohort.read_classes(data / "cohort")
    _check_unseen(data / "pretrain" / encoder, split.protocol)
    table = labelled(split, classes)
    plan = plan_of(table, data / "embed" / encoder, head, len(classes), settings_file)
    if split.protocol == OPTIMISTIC:
        plan = [dataclasses.replace(fit, optimistic=True) for fit in plan]
    checks = sanity.fits_of(plan, settings.seeds, split.protocol) if settings.sanity else {}
    target = data / "evaluate" / encoder / head
    everything = [*plan, *(fit for found in checks.values() for fit in found)]
    _run(everything, _surveyed(plan[0]), target / "fits")
    write(target, plan, checks, table, classes, split)
    shutil.rmtree(target / "fits")


def _check_unseen(folder: Path, protocol: str) -> None:
    """Refuse to test an encoder on slides whose labels it learned from."""
    if protocol != "crossval" or not (folder / "encoder.json").is_file():
        return
    made = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))["provenance"]
    if made.get("method") == cohort.LABELLED and made.get("steps"):
        raise ValueError(
            f"the encoder in {folder} learned from the labels of cohort.csv's train slides (method "
            f"{cohort.LABELLED}), and split.protocol crossval would test on them: set it to holdout"
        )


def labelled(split: Splits, classes: list[str]) -> pd.DataFrame:
    """The splits with `label` as the index of the class; optimistic: test slides validate too.

    Raises:
        ValueError: a label is no class, or a part lacks a class, or a patient is in two.
    """
    table, optimistic = split.table, split.protocol == OPTIMISTIC
    made_splits.check(table, ("train", "test") if optimistic else PARTS, classes)
    if optimistic:
        table = pd.concat([table, table[table.split == "test"].assign(split="val")])
    return table.assign(label=table.label.map(classes.index))


def plan_of(
    table: pd.DataFrame, folder: Path, head: str, classes: int, settings_file: Path
) -> list[Fit]:
    """A fit for each repeat, fold and seed."""
    settings = params.load(EvaluateParams, "evaluate", settings_file)
    first = params.load(params.Top, path=settings_file).seed
    chosen = params.load(plugins.load("heads", head).Params, f"evaluate.{head}", settings_file)
    plan = []
    for (repeat, fold), rows in table.groupby(KEYS):
        parts = {part: rows[rows.split == part] for part in PARTS}
        slide_ids = {part: found.slide_id.tolist() for part, found in parts.items()}
        labels = {part: parts[part].label.tolist() for part in ("train", "val")}
        for seed in range(first, first + settings.seeds):
            name = f"repeat{repeat}-fold{fold}-seed{seed}"
            given = (head, chosen, classes, folder.resolve(), slide_ids, labels)
            plan.append(Fit(name, int(repeat), int(fold), seed, *given))
    return plan


def _surveyed(fit: Fit) -> dict[str, str]:
    """Digests of all bags, which were looked at; every split has the same slides."""
    slide_ids = sorted({slide for found in fit.slide_ids.values() for slide in found})
    module = plugins.load("heads", fit.head)
    found = bags.survey(fit.bags, slide_ids, getattr(module, "SCALES", 1))
    module.build(found.dim, fit.classes, fit.params)  # refuses sizes that do not fit, here once
    return found.digests


def _run(plan: list[Fit], digests: dict[str, str], folder: Path) -> None:
    head, chosen, classes = plan[0].head, plan[0].params, plan[0].classes
    perslide.run(
        "evaluate",
        fits.make,
        [fit.job(digests) for fit in plan],
        folder,
        code=("stages.common.fits", f"stages.heads.{head}"),
        settings={"head": head, "classes": classes, "params": dataclasses.asdict(chosen)},
        noun="fit",
    )


def write(
    target: Path,
    plan: list[Fit],
    checks: dict[str, list[Fit]],
    table: pd.DataFrame,
    classes: list[str],
    split: Splits,
) -> None:
    """Score the test slides, for the first time here, and write every file."""
    predictions = _predictions(target / "fits", plan, table)
    figures: dict[str, Any] = metrics.cell(predictions, classes, plan[0].seed)
    for name, found in checks.items():
        areas = _areas(_predictions(target / "fits", found, table), len(classes))
        figures[name] = float(np.mean(areas))
        if len(areas) > 1:
            figures[f"{name}_seed_sd"] = float(np.std(areas, ddof=1))
    prefix = "optimistic_" if split.protocol == OPTIMISTIC else ""
    run.write_metrics(
        target / "metrics.json", {prefix + name: value for name, value in figures.items()}
    )
    marked = {"protocol": split.protocol}
    _write_parquet(target / "predictions.parquet", predictions.assign(**marked))
    _write_parquet(target / "attention.parquet", _attention(target / "fits", plan))
    for name, curve in metrics.curves(predictions, classes).items():
        with run.atomic(target / f"{name}.csv") as temporary:
            curve.assign(**marked).to_csv(temporary, index=False, lineterminator="\n")
    with run.atomic(target / "split.json") as temporary:
        temporary.write_text(json.dumps({**marked, "digest": split.digest}) + "\n")
    logger.info("%s: %sAUC %.3f over %d fits", target, prefix, figures["auc"], len(plan))


def _predictions(folder: Path, plan: list[Fit], table: pd.DataFrame) -> pd.DataFrame:
    """What the fits say, beside what is true; one row a slide and fit."""
    said = pd.concat([pd.read_parquet(folder / fit.name / "predictions.parquet") for fit in plan])
    keys = [*KEYS, "slide_id", "split"]
    found = said.merge(table[[*keys, "patient", "label"]], on=keys, validate="many_to_one")
    return found[PREDICTED + [name for name in found if name not in PREDICTED]]


def _areas(predictions: pd.DataFrame, classes: int) -> list[float]:
    """The test AUC of each seed."""
    tests = predictions[predictions.split == "test"]
    columns = [f"probability_{at}" for at in range(classes)]
    return [
        merits.areas(rows.label.to_numpy(), rows[columns].to_numpy())["auc"]
        for _, rows in tests.groupby("seed")
    ]


def _attention(folder: Path, plan: list[Fit]) -> pd.DataFrame:
    """The mean over the seeds of each split."""
    splits: dict[tuple[int, int], list[pd.DataFrame]] = {}
    for fit in plan:
        found = pd.read_parquet(folder / fit.name / "attention.parquet")
        splits.setdefault((fit.repeat, fit.fold), []).append(found)
    means = []
    for (repeat, fold), seeds in splits.items():
        mean = np.mean([table.attention for table in seeds], axis=0, dtype=np.float64)
        means.append(seeds[0].assign(attention=mean.astype(np.float32), repeat=repeat, fold=fold))
    return pd.concat(means)[["slide_id", *KEYS, "patch", "attention"]]


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    with run.atomic(path) as temporary:
        table.to_parquet(temporary, index=False)


def command() -> None:
    """`python -m stages.evaluate <encoder> <head>`: the names of one cell of the matrix."""
    if len(sys.argv) != 3:
        raise ValueError(f"evaluate got {sys.argv[1:]}: give an encoder and a head")
    main(*sys.argv[1:])


if __name__ == "__main__":
    run.start(command)
