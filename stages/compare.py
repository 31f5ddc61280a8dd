"""Stage 9, compare: Table 1, and every encoder against the others under each head.

    reads   data/cohort, data/split, data/evaluate
    writes  data/compare  comparisons.csv, table1.md, table1.csv, table1.png, metrics.json,
                          and for `dvc metrics` and `dvc plots` cells/ (metrics.json of each cell),
                          roc.csv, pr.csv, calibration.csv (all cells), confusion/ (each cell)

Run it with `dvc repro compare`; its settings are the `compare` section of params.yaml. Nothing is
trained or chosen here: the numbers come from the predictions and metrics of evaluate.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stages.common import cohort, comparisons, curves, params, run, scores, table1

logger = logging.getLogger(__name__)

COUNTED = {
    "test slide": "slides_test",
    "patient": "patients_test",
    "split": "splits",
    "seed": "seeds",
}
CURVES = ("roc", "pr", "calibration")
Cells = dict[tuple[str, str], Path]  # the folder of each (encoder, head)


@dataclass(frozen=True)
class CompareParams:
    """Section compare of params.yaml."""

    reference: str  # the encoder that the others are compared with; empty: every pair
    resamples: int  # of patients, for the bootstrap of differences

    def __post_init__(self) -> None:
        """Reject resamples too few for a 95 % interval."""
        if self.resamples < 100:
            raise ValueError(
                f"compare.resamples is {self.resamples}: it must be 100 or more, 2000 is usual"
            )


def main(
    data: Path = Path("data"),
    target: Path = Path("data/compare"),
    settings_file: Path = Path("params.yaml"),
) -> None:
    """Collect the cells that params.yaml names, compare them and write the five files.

    Raises:
        FileNotFoundError: the split or a cell is missing; the message names its stage.
        ValueError: a cell was fitted on other splits than data/split has.
    """
    settings = params.load(CompareParams, "compare", settings_file)
    seed = params.load(params.Top, path=settings_file).seed
    cells = cells_of(data / "evaluate", settings_file)
    split = _read_json(data / "split" / "splits.json", "split")
    for folder in cells.values():
        _check_split(folder, split)
    metrics = {
        cell: _read_json(folder / "metrics.json", "evaluate") for cell, folder in cells.items()
    }
    table = table1.rows_of(metrics)
    caption = caption_of(split, metrics)
    _write_table(target, table, caption)
    classes = len(cohort.read_classes(data / "cohort"))
    tests = {cell: _tests(folder, classes) for cell, folder in cells.items()}
    found = comparisons.table(tests, settings.reference, seed, settings.resamples)
    if len(found):
        found.insert(3, "protocol", split["protocol"])
    with run.atomic(target / "comparisons.csv") as temporary:
        found.to_csv(temporary, index=False, lineterminator="\n")
    run.write_metrics(target / "metrics.json", summary(table, found, table1.prefix_of(metrics)))
    gather(cells, target)


def cells_of(folder: Path, settings_file: Path) -> Cells:
    """The folders of evaluate for each encoder and head that params.yaml names, in that order."""
    encoders, heads = (
        params.section_of(section, settings_file)[key]
        for section, key in (("embed", "encoders"), ("evaluate", "heads"))
    )
    return {(encoder, head): folder / encoder / head for head in heads for encoder in encoders}


def gather(cells: Cells, target: Path) -> None:
    """One file of every kind of curve for all cells, so that dvc.yaml names no encoder or head."""
    for name in CURVES:
        tables = [
            _curve(_need(folder / f"{name}.csv", "evaluate")).assign(cell=f"{head} {encoder}")
            for (encoder, head), folder in cells.items()
        ]
        with run.atomic(target / f"{name}.csv") as temporary:
            pd.concat(tables).to_csv(temporary, index=False, lineterminator="\n")
    for (encoder, head), folder in cells.items():
        for source, kind in (("metrics.json", "cells"), ("confusion.csv", "confusion")):
            ending = Path(source).suffix
            with run.atomic(target / kind / f"{head}-{encoder}{ending}") as temporary:
                temporary.write_bytes(_need(folder / source, "evaluate").read_bytes())


def _curve(file: Path) -> pd.DataFrame:
    table = pd.read_csv(file)
    if "scaling" in table:
        table = table[table.scaling == "after"]
    return curves.thinned(table)


def _check_split(folder: Path, split: dict[str, object]) -> None:
    of_cell = _read_json(folder / "split.json", "evaluate")
    if any(of_cell[key] != split[key] for key in ("protocol", "digest")):
        raise ValueError(
            f"{folder} was made on other splits (protocol {of_cell['protocol']}) than data/split "
            f"holds (protocol {split['protocol']}): run `dvc repro evaluate`"
        )


def caption_of(split: dict[str, object], metrics: dict[tuple[str, str], dict[str, float]]) -> str:
    """What the numbers are of: protocol, slides, patients, runs, and what their intervals mean."""
    first = next(iter(metrics.values()))
    slides, patients, splits, seeds = (
        f"{count} {name}" if count == 1 else f"{count} {name}s"
        for name, key in COUNTED.items()
        for count in [int(first[table1.prefix_of(metrics) + key])]
    )
    text = (
        f"Table 1. Mean over {splits} and {seeds} of each (protocol {split['protocol']}), on "
        f"{slides} of {patients} [95 % interval over patients, given the trained heads: DeLong for "
        "AUC (Newcombe where it is 1), bootstrap for balanced accuracy, Wilson for shares]. The "
        "best of a head's encoders is bold."
    )
    if any(key.endswith(tuple(table1.SANITY)) for key in first):
        text += " Rows in parentheses are of the first split alone, means over the encoders."
    return f"{table1.WARNING} {text}" if table1.prefix_of(metrics) else text


def summary(table: pd.DataFrame, found: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Few numbers for `dvc metrics`: each AUC, each difference with its corrected p, and counts."""
    rows = found.to_dict("records")
    cells = table[~table1.is_sanity(table)].to_dict("records")
    values: dict[str, float] = {
        "cells": len(cells),
        "comparisons": len(rows),
        prefix + "significant_after_holm": int(sum(row["p_holm"] < 0.05 for row in rows)),
    }
    for row in cells:
        values[f"{prefix}{row['head']}_{row['encoder']}_auc"] = row[prefix + "auc"]
    for row in rows:
        name = f"{prefix}{row['head']}_{row['encoder']}_minus_{row['other']}_auc"
        values[name] = row["auc_difference"]
        if pd.notna(row["p_holm"]):
            values[f"{name}_p_holm"] = row["p_holm"]
    return values


def _write_table(target: Path, table: pd.DataFrame, caption: str) -> None:
    text = table1.markdown(table, caption)
    logger.info("%s", text)
    with run.atomic(target / "table1.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with run.atomic(target / "table1.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    with run.atomic(target / "table1.png") as temporary:
        drawn = table1.picture(table, caption)
        drawn.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def _tests(folder: Path, classes: int) -> list[scores.Scores]:
    predictions = pd.read_parquet(_need(folder / "predictions.parquet", "evaluate"))
    return scores.of_part(predictions, classes)


def _read_json(path: Path, stage: str) -> dict[str, float]:
    return json.loads(_need(path, stage).read_text(encoding="utf-8"))


def _need(path: Path, stage: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `dvc repro {stage}`")
    return path


if __name__ == "__main__":
    run.start(main)
