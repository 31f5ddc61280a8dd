"""data/cohort/cohort.csv: the slides of the cohort, one a row, as every stage reads them."""

import csv
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from stages.common import cache
from stages.common.run import atomic

SPLITS = ("train", "val", "test")
LABELLED = "vpu"  # the method of pretraining that learns from the labels of train slides


@dataclass(frozen=True)
class SlideRow:
    """One slide of the cohort."""

    slide_id: str
    path: str  # of the file, relative to the repository where it lies inside
    label: str
    patient: str
    split: str  # train, val or test; empty until the cohort is split
    mpp: str  # microns per pixel of level 0; empty until the slide was opened
    digest: str  # SHA-256 of the file's content; empty until it was read


def read_rows(folder: Path = Path("data/cohort")) -> list[SlideRow]:
    """The cohort's slides in the order of their ids.

    Raises:
        FileNotFoundError: the cohort stage has not run.
    """
    file = folder / "cohort.csv"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `dvc repro cohort` first")
    with file.open(newline="", encoding="utf-8") as opened:
        return [SlideRow(**row) for row in csv.DictReader(opened)]


def read_classes(folder: Path = Path("data/cohort")) -> list[str]:
    """The label of each class number; of two the positive class is the last."""
    file = folder / "classes.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `dvc repro cohort` first")
    return list(json.loads(file.read_text(encoding="utf-8"))["classes"])


def write_rows(folder: Path, rows: list[SlideRow], classes: list[str]) -> None:
    """Write cohort.csv and classes.json."""
    with (
        atomic(folder / "cohort.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as opened,
    ):
        writer = csv.DictWriter(opened, [field.name for field in fields(SlideRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    with atomic(folder / "classes.json") as temporary:
        text = json.dumps({"classes": classes}, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def locate(path: str) -> Path:
    """Where a cohort's file lies: here, or in the repository that this is a temporary copy of."""
    here = os.path.exists(path)  # Path.exists raises where a folder is closed or a share is gone
    return Path(path) if here else cache.repository() / path
