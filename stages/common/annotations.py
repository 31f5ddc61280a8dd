"""Annotated nuclei as people keep them, read into centroids: COCO, Pascal VOC, CSV, label images.

The files are not trusted: no path leads out of the image folder, and what does not fit, or may be
read in two ways, is an error that names the file and the place. Points are (x, y) in pixels of the
image, and pixel column j covers [j, j + 1): the centre of the first pixel is 0.5.
"""

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from jaxtyping import Float64

from stages.common import coco, masks, voc
from stages.common.marks import IMAGES, Extent, Mark, middle, number

NAMED = 5  # so many of a long list are spelled out
COLUMNS = (("x", "y"), ("x0", "y0", "x1", "y1"))  # of a CSV; the first that are all there serve
SIDES = {"w", "h", "width", "height"}  # beside x and y, which then may be a corner or the centre
CLASSLESS = "(none)"  # class of a CSV's row whose cls is empty


@dataclass(frozen=True)
class Annotated:
    """An image and its nuclei."""

    name: str  # of the image, as the annotations call it
    path: Path
    points: Float64[np.ndarray, "nuclei 2"]
    extent_px: Extent


@dataclass(frozen=True)
class Annotations:
    """What was read."""

    form: str  # the format, and how it was understood
    images: list[Annotated]  # in the order of their names
    seen: dict[str, int]  # nuclei by class, kept or not; empty where there are no classes
    others: int  # images in the folder that the annotations do not name


def read(source: Path, folder: Path, classes: Collection[str] = ()) -> Annotations:
    """Read annotations of any of the formats; the file, or what the folder holds, tells which.

    Args:
        source: A COCO .json, a .csv, a folder of VOC .xml, or a folder of label images (.png, .tif)
            named like the images.
        folder: Where the images lie; names in the annotations start here.
        classes: Keep nuclei of these only; images without any stay, as images without nuclei.

    Raises:
        FileNotFoundError: `source`, `folder` or an annotated image is missing.
        ValueError: the annotations are of no known format, or wrong at a place that is named.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --images must be the folder of the images")
    present = sorted(
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGES
    )
    form, marks = _recognised(source, folder, present)
    points: dict[str, list[tuple[float, float]]] = {}
    extents: dict[str, Extent] = {}
    seen: Counter[str] = Counter()
    for mark in marks:
        nuclei = points.setdefault(mark.image, [])
        extents[mark.image] = _agreed(source, mark, extents.get(mark.image))
        if mark.point is None:
            continue
        seen.update([] if mark.kind is None else [mark.kind])
        if not classes or mark.kind in classes:
            nuclei.append(mark.point)
    _check(source, points, seen, classes)
    paths = _located(source, folder, sorted(points))
    images = [
        Annotated(name, path, np.array(points[name], float).reshape(-1, 2), extents[name])
        for name, path in paths.items()
    ]
    others = max(0, len(present) - len(images))
    return Annotations(form, images, dict(seen.most_common()), others)


def _agreed(source: Path, mark: Mark, known: Extent) -> Extent:
    if known and mark.extent_px and known != mark.extent_px:
        first, second = ("{} by {}".format(*one) for one in (known, mark.extent_px))
        raise ValueError(
            f"{source}: image {mark.image} is said to be {first} px wide and high, and {second} "
            "elsewhere: export the annotations anew, for one size"
        )
    return known or mark.extent_px


def _recognised(
    source: Path, folder: Path, present: list[PurePath]
) -> tuple[str, Iterator[Mark] | list[Mark]]:
    if source.is_file():
        if source.suffix.lower() == ".json":
            return "COCO", coco.read(source)
        if source.suffix.lower() == ".csv":
            columns = _columns(source)
            return f"CSV, columns {', '.join(columns)}", _csv(source, columns)
        raise ValueError(
            f"{source} is no .json (COCO) and no .csv: give one of these, or a folder of VOC .xml "
            "or of label images"
        )
    if not source.is_dir():
        raise FileNotFoundError(f"no annotations {source}: give a .json, a .csv or a folder")
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.name[0] != "."]
    suffixes = {path.suffix.lower() for path in files}
    if suffixes == {".xml"}:
        return "Pascal VOC", voc.read(files, present)
    if suffixes and suffixes <= masks.SUFFIXES:
        return masks.read(files, folder)
    found = ", ".join(sorted(suffixes)[:NAMED]) or "nothing"
    raise ValueError(
        f"folder {source} holds {found}: it must hold .xml (Pascal VOC) only, or label images "
        "(.png, .tif) only"
    )


def _check(
    source: Path, points: dict[str, list], seen: dict[str, int], classes: Collection[str]
) -> None:
    if not points:
        raise ValueError(f"{source} names no image: there is nothing to score")
    for name in classes:
        if name not in seen:
            known = ", ".join(sorted(seen)[:20]) or "without classes"
            raise ValueError(f"{source} has no class {name!r}: its nuclei are {known}")
    for image, nuclei in points.items():
        (x, y), count = next(iter(Counter(nuclei).most_common(1)), ((0, 0), 0))
        if count > 1:
            raise ValueError(
                f"{source} has {count} nuclei at x {x:g}, y {y:g} of image {image}: each must be "
                "there once; take the copies out, or choose with --classes"
            )


def _located(source: Path, folder: Path, names: list[str]) -> dict[str, Path]:
    """The file of each image; every one exists, inside the folder, under one name."""
    found = {name: _inside(source, folder, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(names)} images are not in {folder}: "
            f"{', '.join(missing[:NAMED])}{', ...' if len(missing) > NAMED else ''}; --images must "
            "be the folder where these paths start"
        )
    paths = {name: path for name, path in found.items() if path is not None}
    first: dict[Path, str] = {}
    for name, path in paths.items():
        if first.setdefault(path, name) != name:
            raise ValueError(f"{source}: {first[path]} and {name} are one image: use one name")
    return paths


def _inside(source: Path, folder: Path, name: str) -> Path | None:
    """The file; None where there is none."""
    try:
        path = (folder / name).resolve()
        found = path.is_file()
    except (ValueError, OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{source}: {name[:100]!r} is no path of an image: {why}") from None
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{source}: image {name!r} leads out of {folder}: paths must stay inside --images"
        )
    return path if found else None


def _rows(source: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each row that is not blank, the header first."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as opened:
            rows = csv.reader(opened, strict=True, skipinitialspace=True)
            yield from ((rows.line_num, [field.strip() for field in row]) for row in rows if row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source} is no CSV in UTF-8: {error}; export it anew") from None


def _columns(source: Path) -> tuple[str, ...]:
    header = next(_rows(source), (1, []))[1]
    for columns in COLUMNS:
        if {"path", *columns} <= set(header):
            for name in ("path", *columns, "cls"):
                if header.count(name) > 1:
                    raise ValueError(f"{source}, row 1: column {name} is there twice: keep one")
            _check_meaning(source, header)
            return columns
    found = ", ".join(header)[:200] or "nothing"
    raise ValueError(
        f"{source}, row 1 is {found}: it must name path,x,y or path,x0,y0,x1,y1, between commas"
    )


def _check_meaning(source: Path, header: list[str]) -> None:
    """Refuse x and y with a width and a height alone: some tools write the corner, some not."""
    sides = SIDES & {name.lower() for name in header}
    if len(sides) > 1 and not set(COLUMNS[1]) <= set(header):
        raise ValueError(
            f"{source}, row 1 names x,y and {','.join(sorted(sides))}: x,y may be a corner or the "
            "centre; where it is the centre take these columns out, else write x0,y0,x1,y1"
        )


def _csv(source: Path, columns: tuple[str, ...]) -> Iterator[Mark]:
    """A row a nucleus; a row with a path alone is an image without nuclei."""
    rows = _rows(source)
    _, header = next(rows)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{source}, row {line} has {len(row)} fields: it must have {len(header)}"
            )
        named = dict(zip(header, row, strict=True))
        if not named["path"]:
            raise ValueError(f"{source}, row {line}: path is empty: it must name an image")
        if not any(named[name] for name in columns):
            yield Mark(named["path"])
            continue
        where = f"{source}, row {line}, column"
        box = [number(named[name], f"{where} {name}") for name in columns]
        point = (box[0], box[1]) if len(box) == 2 else middle(box, f"{source}, row {line}: the box")
        yield Mark(named["path"], point, (named["cls"] or CLASSLESS) if "cls" in named else None)
