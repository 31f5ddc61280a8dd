"""Which slides train, validate and test in every repeat and fold: one table for all encoders."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from stages.common import cohort
from stages.common.cohort import SlideRow
from stages.common.run import atomic, write_metrics

KEYS = ["repeat", "fold"]
COLUMNS = [*KEYS, "slide_id", "patient", "label", "split"]
OPTIMISTIC = "paper_optimistic"


@dataclass(frozen=True)
class Splits:
    """What the stage split wrote."""

    table: pd.DataFrame  # COLUMNS; every slide once for each (repeat, fold)
    protocol: str
    digest: str  # SHA-256 of splits.csv


def read(folder: Path = Path("data/split")) -> Splits:
    """The splits, proven to be those that were written.

    Raises:
        FileNotFoundError: the stage split has not run.
        ValueError: splits.csv was changed afterwards.
    """
    file = folder / "splits.csv"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `dvc repro split` first")
    described = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    if _digest(file) != described["digest"]:
        raise ValueError(f"{file} is not what was written: run `dvc repro -f split`")
    text = {name: str for name in COLUMNS[2:]}
    table = pd.read_csv(file, dtype=text, keep_default_na=False)
    return Splits(table, described["protocol"], described["digest"])


def write(folder: Path, table: pd.DataFrame, protocol: str) -> None:
    """Write splits.csv, splits.json and the counts of metrics.json."""
    with atomic(folder / "splits.csv") as temporary:
        table[COLUMNS].to_csv(temporary, index=False, lineterminator="\n")
    repeats, folds = (int(table[name].nunique()) for name in KEYS)
    described = {"protocol": protocol, "digest": _digest(folder / "splits.csv")}
    with atomic(folder / "splits.json") as temporary:
        text = json.dumps({**described, "repeats": repeats, "folds": folds}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
    first = table[(table.repeat == 0) & (table.fold == 0)]
    counts = {part: int((first.split == part).sum()) for part in cohort.SPLITS}
    patients = int(first.patient.nunique())
    write_metrics(
        folder / "metrics.json",
        {"repeats": repeats, "folds": folds, "patients": patients, "first_fold_slides": counts},
    )


def holdout(rows: list[SlideRow], optimistic: bool = False) -> pd.DataFrame:
    """The cohort's own splits; `optimistic`: validation slides train, as where there are none."""
    open_ = next((row for row in rows if row.split not in cohort.SPLITS), None)
    if open_:
        raise ValueError(
            f"slide {open_.slide_id} has the split {open_.split!r} in cohort.csv: it must be one "
            f"of {', '.join(cohort.SPLITS)}; run `dvc repro cohort`"
        )
    part = {"train": "train", "val": "train" if optimistic else "val", "test": "test"}
    return _table(rows, {row.patient: part[row.split] for row in rows}, 0, 0)


def crossval(
    rows: list[SlideRow], repeats: int, folds: int, val_share: float, seed: int
) -> pd.DataFrame:
    """Repeated stratified k-fold over patients, with validation patients carved out of the rest.

    Patients, not slides, are dealt: a patient's rarest label is the patient's class, and every
    fold gets as many patients of a class as of another fold, or one more. So no fold lacks a
    class, which grouped k-fold over slides cannot promise.

    Args:
        rows: The cohort.
        repeats: Deals, each with another seed.
        folds: Parts of a deal; each is the test part once.
        val_share: Share of each class's other patients, at least one, that validate.
        seed: Of the deals.

    Raises:
        ValueError: a class has too few patients.
    """
    _check_one(pd.DataFrame([{"patient": row.patient} for row in rows]))
    label = _label_of_patients(rows)
    patients = np.array(sorted(label))
    labels = np.array([label[patient] for patient in patients])
    _check_patients(Counter(labels.tolist()), folds)
    tables = []
    for repeat in range(repeats):
        deal = StratifiedKFold(folds, shuffle=True, random_state=(seed + repeat) % 2**32)
        for fold, (rest, test) in enumerate(deal.split(patients, labels)):
            rng = np.random.default_rng([seed, repeat, fold])
            val = _drawn(patients[rest], labels[rest], val_share, rng)
            split = {patient: "val" if patient in val else "train" for patient in patients[rest]}
            split |= dict.fromkeys(patients[test], "test")
            tables.append(_table(rows, split, repeat, fold))
    return pd.concat(tables, ignore_index=True)


def check(table: pd.DataFrame, parts: tuple[str, ...], classes: Sequence[str]) -> None:
    """Refuse splits that leave a class out of a part, a patient in two parts, a label unknown.

    Raises:
        ValueError: names the part and class, the patient or the slide, and what to do.
    """
    unknown = table[~table.label.isin(classes)]
    if len(unknown):
        raise ValueError(
            f"slide {unknown.slide_id.iloc[0]} has the label {unknown.label.iloc[0]!r}: the "
            f"cohort's classes are {', '.join(classes)}; mend the label and run `dvc repro cohort`"
        )
    _check_one(table)
    for (repeat, fold), rows in table.groupby(KEYS):
        crossed = rows.groupby("patient").split.nunique()
        if (crossed > 1).any():
            raise ValueError(
                f"patient {crossed.idxmax()} is in two parts of repeat {repeat}, fold {fold}: a "
                "patient must be in one; rerun `dvc repro cohort`"
            )
        present = set(zip(rows.split, rows.label, strict=True))
        for part, name in ((part, name) for part in parts for name in classes):
            if (part, name) not in present:
                raise ValueError(
                    f"{part} of repeat {repeat}, fold {fold} has no slide of class {name}: every "
                    "part needs all classes; add patients of it, or set the column split"
                )


def _check_one(table: pd.DataFrame) -> None:
    if table.patient.nunique() == 1:
        raise ValueError(
            f"all slides are of one patient, {table.patient.iloc[0]}: train, val and test need "
            "different ones; add patients, or fill in who the slides are of"
        )


def _label_of_patients(rows: list[SlideRow]) -> dict[str, str]:
    counts = Counter(row.label for row in rows)
    of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        of[row.patient].add(row.label)
    return {who: min(names, key=lambda name: (counts[name], name)) for who, names in of.items()}


def _check_patients(patients: Counter[str], folds: int) -> None:
    # beside the largest fold there must be two, for train and val
    least = max(folds, 4 if folds == 2 else 3)
    for label, count in sorted(patients.items()):
        if count < least:
            raise ValueError(
                f"class {label} has {count} patients: {folds} folds need {least} or more, "
                "one for each fold and others to train and validate on; lower split.folds, add "
                "patients or use split.protocol holdout"
            )


def _drawn(
    patients: np.ndarray, labels: np.ndarray, share: float, rng: np.random.Generator
) -> set[str]:
    found: set[str] = set()
    for label in np.unique(labels):
        of_class = rng.permutation(patients[labels == label])
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        found.update(of_class[:count].tolist())
    return found


def _table(rows: list[SlideRow], split: dict[str, str], repeat: int, fold: int) -> pd.DataFrame:
    lines = [
        (repeat, fold, row.slide_id, row.patient, row.label, split[row.patient]) for row in rows
    ]
    return pd.DataFrame(lines, columns=COLUMNS)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
