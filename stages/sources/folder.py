"""A folder of slides and a CSV of labels: the user's own cohort.

The CSV has the columns slide (path within the folder) and label, and may have patient, slide_id,
mpp and split (train, val, test). Without patient each slide is a patient of its own.
"""

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.common import cache
from stages.common.cohort import SPLITS, SlideRow, locate
from stages.common.slides import entry_file

REQUIRED = ("slide", "label")
KNOWN = (*REQUIRED, "patient", "slide_id", "mpp", "split")


@dataclass(frozen=True)
class Params:
    """The section `cohort.folder`."""

    slides: str  # folder of the slides, within the repository or absolute
    labels: str  # the CSV file


def build(params: Params, seed: int, target: Path) -> list[SlideRow]:
    """Read the CSV and check every row of it.

    Raises:
        FileNotFoundError: the folder or the CSV is not there.
        ValueError: something is wrong with the CSV; the message lists every problem found.
    """
    folder, labels = locate(params.slides), locate(params.labels)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {params.slides}: put slides there or set cohort.folder")
    table = _read(labels)
    problems: list[str] = []
    rows = []
    for number, record in enumerate(table, start=2):
        try:
            rows.append(_row(record, folder))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{labels.name} has {len(problems)} problems:\n  {listed}")
    return rows


def _read(labels: Path) -> list[dict[str, str]]:
    if not labels.is_file():
        columns = ", ".join(KNOWN)
        raise FileNotFoundError(f"no labels file {labels}: write a CSV with columns {columns}")
    with labels.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        columns = [column.strip() for column in reader.fieldnames or []]
        for column in REQUIRED:
            if column not in columns:
                found = ", ".join(columns) or "nothing"
                raise ValueError(f"{labels.name} has no column {column}: it has {found}")
        table = [
            {str(name).strip(): (value or "").strip() for name, value in record.items() if name}
            for record in reader
        ]
    if not table:
        raise ValueError(f"{labels.name} names no slides: add a row for each slide")
    return table


def _row(record: dict[str, str], folder: Path) -> SlideRow:
    relative = PurePosixPath(record["slide"])
    if not record["slide"]:
        raise ValueError("column slide is empty: give the path of the slide within the folder")
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"slide {relative} lies outside {folder}: give a path within it")
    if not (folder / relative).exists():
        raise FileNotFoundError(f"slide {relative} is not in {folder}: correct it or copy the file")
    if not record["label"]:
        raise ValueError(f"slide {relative} has no label: give one, or take the slide out")
    if record.get("split") and record["split"] not in SPLITS:
        choice = ", ".join(SPLITS)
        raise ValueError(f"slide {relative} has split {record['split']!r}: choose of {choice}")
    slide_id = record.get("slide_id") or relative.stem
    return SlideRow(
        slide_id=slide_id,
        path=_portable(entry_file(folder / relative)),
        label=record["label"],
        patient=record.get("patient") or slide_id,
        split=record.get("split", ""),
        mpp=_mpp(record.get("mpp", ""), str(relative)),
        digest="",
    )


def _mpp(text: str, slide: str) -> str:
    try:
        return repr(float(text)) if text else ""
    except ValueError:
        raise ValueError(f"slide {slide} has mpp {text!r}: it must be a number") from None


def _portable(path: Path) -> str:
    """Relative to the repository where the file lies inside it, so that results do not move."""
    home = cache.repository().resolve()
    whole = path.absolute()
    return str(whole.relative_to(home) if whole.is_relative_to(home) else whole)
