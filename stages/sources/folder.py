"""A folder of slides and a CSV of labels: the user's own cohort.

The CSV has the columns slide and label, and may have patient, slide_id, mpp and split (train, val,
test). Without patient each slide is a patient of its own. A slide is named by its path within the
folder, or by its name alone, with its suffix or without, where it is the only one of that name in
the folder and those below it. A DICOM slide is a folder, an MRXS slide its `.mrxs` file.
"""

import csv
import difflib
import functools
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from stages.common import cache, readers, slide_names, walk
from stages.common.cohort import SPLITS, SlideRow, locate
from stages.common.slide_files import entry_file

logger = logging.getLogger(__name__)

LINE = " line"  # no column can be called so: names are stripped
REQUIRED = ("slide", "label")
Named = dict[str, list[Path]]
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
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {params.slides}: put slides there or set cohort.folder")
    for place in (folder, labels):
        if os.path.exists(place) and not os.access(place, os.R_OK):
            raise PermissionError(f"{place} may not be read by this user: change its permissions")
    table = _read(labels)
    named = functools.cache(lambda: _by_name(folder))  # one walk, and only where it is needed
    problems: list[str] = []
    rows = []
    for record in table:
        try:
            rows.append(_row(record, folder, named))
        except (ValueError, FileNotFoundError) as error:
            problems.append(f"line {record[LINE]}: {error}")
    if problems:
        listed = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ValueError(f"{labels.name} has {count}:\n  {listed}")
    return rows


def _read(labels: Path) -> list[dict[str, str]]:
    if not os.path.isfile(labels):
        columns = ", ".join(KNOWN)
        raise FileNotFoundError(f"no labels file {labels}: write a CSV with columns {columns}")
    try:
        with labels.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            _check_columns([column.strip() for column in reader.fieldnames or []], labels.name)
            table = [_clean(record, reader.line_num) for record in reader]
    except UnicodeDecodeError:
        raise ValueError(f"{labels.name} is not UTF-8 text: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{labels.name} is no CSV: {error}; look for a stray quote") from None
    if not table:
        raise ValueError(f"{labels.name} names no slides: add a row for each slide")
    return table


def _check_columns(columns: list[str], name: str) -> None:
    """Refuse a table whose columns are absent, twice there, or nearly named as one we know."""
    for column in REQUIRED:
        if column not in columns:
            found = ", ".join(columns) or "nothing"
            raise ValueError(
                f"{name} has no column {column}: it has {found}; separate columns by commas"
            )
    for column in columns:
        if columns.count(column) > 1:
            raise ValueError(f"{name} has the column {column} twice: remove one")
        near = difflib.get_close_matches(column.casefold(), KNOWN, 1, 0.75)
        if column not in KNOWN and near:
            raise ValueError(f"{name} has a column {column}: call it {near[0]}, or rename it")
    if "patient" not in columns:
        logger.info("%s has no column patient: each slide counts as one patient", name)


def _clean(record: dict[str | None, Any], line: int) -> dict[str, str]:
    if None in record:
        raise ValueError(f"line {line} has more fields than columns: quote what holds a comma")
    fields = {str(name).strip(): (value or "").strip() for name, value in record.items()}
    return {**fields, LINE: str(line)}


def _row(record: dict[str, str], folder: Path, named: Callable[[], Named]) -> SlideRow:
    relative = PurePosixPath(record["slide"].replace("\\", "/"))
    if not record["slide"]:
        raise ValueError("column slide is empty: give the path of the slide within the folder")
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"slide {relative} lies outside {folder}: give a path within it")
    file = _found(relative, folder, named)
    if not record["label"]:
        raise ValueError(f"slide {relative} has no label: give one, or take the slide out")
    if record.get("split") and record["split"] not in SPLITS:
        choice = ", ".join(SPLITS)
        raise ValueError(f"slide {relative} has split {record['split']!r}: choose of {choice}")
    slide_id = slide_names.normal(record.get("slide_id") or _name_of(relative))
    return SlideRow(
        slide_id=slide_id,
        path=portable(file),
        label=record["label"],
        patient=record.get("patient") or slide_id,
        split=record.get("split", ""),
        mpp=_mpp(record.get("mpp", ""), str(relative)),
        digest="",
    )


def _found(relative: PurePosixPath, folder: Path, named: Callable[[], Named]) -> Path:
    """The file of a slide given by its path, or by its name alone; one that may not be there."""
    if os.path.exists(folder / relative):
        return entry_file(folder / relative)
    found = named().get(slide_names.normal(str(relative)), [])
    if len(found) > 1:
        places = " and ".join(str(file.relative_to(folder)) for file in found[:2])
        raise ValueError(f"slide {relative} may be {places}: give its path within {folder}")
    return entry_file(found[0]) if found else folder / relative


def _by_name(folder: Path) -> Named:
    """Slides in a folder and below it, by path or file name, each with and without suffix."""
    known, found = readers.suffixes(), defaultdict(list)
    files, closed = walk.below(folder)
    for place in closed:
        logger.warning("folder %s may not be read by this user: change its permissions", place)
    for file in files:
        suffix = file.suffix.lower()
        if suffix in known:
            slide = file.parent if suffix == ".dcm" and file.parent != folder else file
            for one, name in ((file, file.name), (slide, _name_of(slide))):
                for called in {name, str((one.parent / name).relative_to(folder))}:
                    if one not in found[slide_names.normal(called)]:
                        found[slide_names.normal(called)].append(one)
    return found


def _name_of(path: PurePath) -> str:
    """A slide's name without its suffix; other dots are part of it."""
    return path.stem if path.suffix.lower() in readers.suffixes() else path.name


def _mpp(text: str, slide: str) -> str:
    try:
        return repr(float(text)) if text else ""
    except ValueError:
        raise ValueError(f"slide {slide} has mpp {text!r}: it must be a number") from None


def portable(path: Path) -> str:
    """Relative to the repository where the file lies inside it, so that results do not move."""
    home = cache.repository().resolve()
    whole = path.absolute()
    return str(whole.relative_to(home) if whole.is_relative_to(home) else whole)
