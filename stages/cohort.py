"""Stage 1, cohort: the slides to work on, checked before hours of work are spent on them.

    reads   the source named in params.yaml (stages/sources), data/index/slides.csv
    writes  data/cohort/cohort.csv    one slide a row: id, path, label, patient, split, mpp, digest
            data/cohort/classes.json  the classes in order; of two the positive one last
            data/cohort/failed.csv    slides that on_error: quarantine left out
            data/cohort/outliers.csv  slides whose mpp is far from the others'

Every problem is found here and all are told at once: files that are missing or damaged, an mpp
that is not known, an id twice, one class only, a patient in two splits. What is wrong with one
slide's file leaves out that slide, where `on_error` is quarantine; what is wrong with the table
is always an error.
"""

import logging
import os
import random
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.common import cohort, failures, intake, outliers, params, plugins, run, slide_names
from stages.common.cohort import SlideRow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CohortParams:
    """The section `cohort`, without the sections of the sources."""

    source: str  # a file of stages/sources
    positive: str  # of two labels the positive one; empty: the last in the alphabet
    test_share: float  # share of each class's patients, 0 to 1 (the paper: 0.3)
    val_share: float  # share of the patients that are not test, 0 to 1


def main(target: Path = Path("data/cohort")) -> None:
    """List, check and split the cohort."""
    chosen = params.load(CohortParams, "cohort")
    seed = params.load(params.Top).seed
    source = plugins.load("sources", chosen.source)
    settings = params.load(source.Params, f"cohort.{chosen.source}")
    target.mkdir(parents=True, exist_ok=True)
    strict = params.load(failures.FailureParams).on_error == "stop"
    rows = sorted(source.build(settings, seed, target), key=lambda row: row.slide_id)
    absent = _absent(rows)
    _check_table(rows, list(absent.values()) if strict else [])
    classes = _classes(rows, chosen.positive)
    rows, failed = intake.look([row for row in rows if row.slide_id not in absent])
    failed |= absent
    if strict:
        _raise([f"{slide_id}: {why}" for slide_id, why in sorted(failed.items())])
    elif failed:
        _leave_out(failed, len(rows))
        classes = _classes(rows, chosen.positive)
    odd = _odd_mpp(rows)
    rows = _split(rows, chosen, seed)
    cohort.write_rows(target, rows, classes)
    failures.write(target, failed)
    outliers.write(target, odd)
    told = {"mpp_outliers": len(odd), "failed": len(failed)}
    run.write_metrics(target / "metrics.json", {**_metrics(rows), **told})
    logger.info("cohort: %d slides of %d patients", len(rows), len({row.patient for row in rows}))


def _absent(rows: list[SlideRow]) -> dict[str, str]:
    """What to say of slides that have no file, or none that this user may see, by id."""
    found = {}
    for row in rows:
        path = cohort.locate(row.path)
        if not os.path.exists(path):
            closed = [
                one for one in path.parents if os.path.isdir(one) and not os.access(one, os.X_OK)
            ]
            found[row.slide_id] = (
                f"folder {closed[0]} may not be read by this user: change its permissions"
                if closed
                else f"slide {row.slide_id} has no file {row.path}: copy it there, or correct the "
                "labels file"
            )
    return found


def _check_table(rows: list[SlideRow], problems: list[str]) -> None:
    """Everything that is wrong with the rows as such, and the `problems` that are known."""
    problems = [*problems, *([] if rows else ["there are no slides: add some to the source"])]
    folded = [slide_names.normal(row.slide_id.casefold()) for row in rows]  # as file systems may
    counts = Counter(folded)
    for row, same in zip(rows, folded, strict=True):
        name = row.slide_id
        if counts[same] > 1:
            problems.append(f"slide id {name} ({row.path}) occurs twice: give a column slide_id")
        if why := slide_names.fault(name):
            problems.append(
                f"slide id {name!r} cannot name a folder: {why}; give another in a column slide_id"
            )
    splits = defaultdict(set)
    for row in rows:
        splits[row.patient].add(row.split)
    problems += [
        f"patient {patient} is in the splits {', '.join(sorted(found))}: put them in one"
        for patient, found in splits.items()
        if len(found) > 1
    ]
    _raise(problems)


def _classes(rows: list[SlideRow], positive: str) -> list[str]:
    labels = sorted({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(f"all slides have the label {labels[0]!r}: a cohort needs two classes")
    choice = ", ".join(labels)
    if positive and len(labels) > 2:
        raise ValueError(
            f"cohort.positive is {positive!r} and the slides have {len(labels)} labels ({choice}): "
            "leave it empty, one class against the rest is scored for each; or merge labels"
        )
    if positive and positive not in labels:
        raise ValueError(f"cohort.positive is {positive!r}: set it to one of {choice}")
    return sorted(labels, key=lambda label: (label == positive, label))


def _leave_out(failed: dict[str, str], left: int) -> None:
    listed = "".join(f"\n  {slide_id}: {why}" for slide_id, why in sorted(failed.items()))
    if not left:
        raise ValueError(
            f"all {len(failed)} slides of the cohort failed, and none is left to go on with: mend "
            f"some:{listed}"
        )
    logger.warning("cohort: %d slides quarantined:%s", len(failed), listed)


def _odd_mpp(rows: list[SlideRow]) -> list[tuple[str, float, float]]:
    """Slides whose mpp is far from the cohort's median, for outliers.csv; each is told of.

    Not an error: a cohort may mix lenses, whose slides are brought to one mpp by tile.
    """
    usual = statistics.median(float(row.mpp) for row in rows)
    factor = intake.MPP_FACTOR
    odd = [row for row in rows if not 1 / factor < float(row.mpp) / usual < factor]
    for row in odd:
        logger.warning(
            "cohort: slide %s has an mpp of %.4g, and %.4g is usual in this cohort: if the lens "
            "was the same, give the right value in the labels file, column mpp",
            row.slide_id,
            float(row.mpp),
            usual,
        )
    return [(row.slide_id, float(row.mpp), usual) for row in odd]


def _split(rows: list[SlideRow], chosen: CohortParams, seed: int) -> list[SlideRow]:
    """Fill in the splits that the source leaves open, patient by patient, alike in every class."""
    for name in ("test_share", "val_share"):
        share = getattr(chosen, name)
        if not 0 < share < 1:
            raise ValueError(f"cohort.{name} is {share}: it must be above 0 and below 1")
    given = {row.patient: row.split for row in rows}
    if not all(given.values()) and any(given.values()):
        open_ = next(patient for patient, split in given.items() if not split)
        raise ValueError(f"patient {open_} has no split and others have: fill the column or none")
    if not any(given.values()):
        given = _draw(rows, given, "", "test", chosen.test_share, seed)
        given = {patient: split or "train" for patient, split in given.items()}
    if "val" not in given.values():
        given = _draw(rows, given, "train", "val", chosen.val_share, seed + 1)
    rows = [replace(row, split=given[row.patient]) for row in rows]
    _check_splits(rows)
    return rows


def _draw(
    rows: list[SlideRow], given: dict[str, str], from_: str, to: str, share: float, seed: int
) -> dict[str, str]:
    """Move a share of each class's patients from one split to another, at least one of each."""
    moved = dict(given)
    by_label: dict[str, set[str]] = defaultdict(set)
    for patient, label in _patient_labels(rows).items():
        if given[patient] == from_:
            by_label[label].add(patient)
    for label in sorted(by_label):
        patients = sorted(by_label[label])
        random.Random(f"{seed}:{label}").shuffle(patients)
        for patient in patients[: max(1, round(share * len(patients)))]:
            moved[patient] = to
    return moved


def _patient_labels(rows: list[SlideRow]) -> dict[str, str]:
    """A patient's rarest label decides, so that no class is lost among mixed patients."""
    counts = Counter(row.label for row in rows)
    first = sorted(rows, key=lambda row: (counts[row.label], row.label), reverse=True)
    return {row.patient: row.label for row in first}  # the last one stands


def _check_splits(rows: list[SlideRow]) -> None:
    present = {(row.split, row.label) for row in rows}
    labels = sorted({row.label for row in rows})
    _raise(
        [
            f"split {split} has no slide of class {label}: it needs 3 patients or more, or a split"
            for split in cohort.SPLITS
            for label in labels
            if (split, label) not in present
        ]
    )


def _raise(problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ValueError(f"the cohort has {count}:\n  {listed}")


def _metrics(rows: list[SlideRow]) -> dict[str, Any]:
    counts: dict[str, Any] = {split: Counter() for split in cohort.SPLITS}
    for row in rows:
        counts[row.split][row.label] += 1
    patients = len({row.patient for row in rows})
    return {"slides": len(rows), "patients": patients, **counts}


if __name__ == "__main__":
    run.start(main)
