"""COCO annotations, read into one point a nucleus: polygons, run lengths or boxes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from stages.common.marks import Mark, middle, number

LONGEST_RUN = 12  # characters of five bits of one run length


def read(source: Path) -> Iterator[Mark]:
    """The marks of a COCO file: the centroid of the segmentation, of the box where there is none.

    Raises:
        ValueError: the file is no COCO, or wrong at a place that is named.
    """
    content = _json(source)
    images = _by_id(source, content, "images", "file_name")
    names = _by_id(source, content, "categories", "name") if content.get("categories") else {}
    entries = {entry["id"]: entry for entry in content["images"]}
    if len(set(images.values())) < len(images):
        raise ValueError(f"{source} lists an image twice: each file_name must be there once")
    for key, name in images.items():
        yield Mark(name, extent_px=_extent(entries[key], f"{source}, image {name}"))
    for at, entry in enumerate(content["annotations"]):
        where = f"{source}, annotations[{at}]"
        image = images.get(_key(entry, "image_id", where))
        if image is None:
            raise ValueError(f"{where}: image_id is {entry['image_id']!r}: no image has that id")
        kind = names.get(_key(entry, "category_id", where)) if names else None
        if names and kind is None:
            raise ValueError(f"{where}: category_id {entry['category_id']!r} is of no category")
        yield Mark(image, _point(entry, where), kind)


def _json(source: Path) -> dict[str, Any]:
    try:
        content = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON: {error}; export it anew") from None
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{source} has no list {name!r}: it must be COCO")
    return content


def _by_id(source: Path, content: dict[str, Any], part: str, value: str) -> dict[int | str, str]:
    entries = content[part]
    if not isinstance(entries, list):
        raise ValueError(f"{source}: {part} is no list: it must be COCO")
    found: dict[int | str, str] = {}
    for at, entry in enumerate(entries):
        where = f"{source}, {part}[{at}]"
        key = _key(entry, "id", where)
        if key in found:
            raise ValueError(f"{where}: id {key!r} is there twice: ids must differ")
        if not isinstance(entry.get(value), str):
            raise ValueError(f"{where} has no {value}: it must be a text")
        found[key] = entry[value]
    return found


def _key(entry: Any, name: str, where: str) -> int | str:
    key = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(key, int | str):
        raise ValueError(f"{where} has no {name}: it must be a number or a text")
    return key


def _extent(entry: dict[str, Any], where: str) -> tuple[int, int] | None:
    width, height = (
        number(entry.get(side) or 0, f"{where}, {side}") for side in ("width", "height")
    )
    return (int(width), int(height)) if width and height else None


def _point(entry: dict[str, Any], where: str) -> tuple[float, float]:
    if entry.get("iscrowd") and not isinstance(entry.get("segmentation"), dict):
        raise ValueError(f"{where} is a crowd, not one nucleus: take it out")
    outline = entry.get("segmentation")
    if isinstance(outline, dict):
        return _of_runs(outline, f"{where}, segmentation")
    if outline:
        return _of_polygons(outline, f"{where}, segmentation")
    x0, y0, width, height = _numbers(entry.get("bbox"), f"{where}, bbox", 4)
    return middle([x0, y0, x0 + width, y0 + height], f"{where}: the box")


def _numbers(values: Any, where: str, count: int = 0) -> list[float]:
    if not isinstance(values, list) or (count and len(values) != count):
        wanted = f"{count} numbers" if count else "a list of numbers"
        raise ValueError(f"{where} is {str(values)[:50]}: it must be {wanted}")
    return [number(value, where) for value in values]


def _of_polygons(outline: Any, where: str) -> tuple[float, float]:
    """Centroid of the area, of all polygons together; of the corners where there is no area."""
    if not isinstance(outline, list):
        raise ValueError(f"{where} is {str(outline)[:50]}: it must be a list of polygons")
    parts = [_corners(part, where) for part in outline]
    areas, moments = zip(*[_area(part) for part in parts], strict=True)
    whole = sum(areas)
    x, y = sum(moments) / whole if whole > 0 else np.concatenate(parts).mean(axis=0)
    return float(x), float(y)


def _corners(part: Any, where: str) -> Float64[np.ndarray, "corner 2"]:
    values = _numbers(part, where)
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{where} has {len(values)} numbers: x and y of three corners or more")
    return np.array(values).reshape(-1, 2)


def _area(corners: Float64[np.ndarray, "corner 2"]) -> tuple[float, Float64[np.ndarray, " 2"]]:
    """Area, and area times centroid: the shoelace formula, around the first corner."""
    first = corners[0]
    ahead, behind = np.roll(corners, -1, axis=0) - first, corners - first
    cross = behind[:, 0] * ahead[:, 1] - ahead[:, 0] * behind[:, 1]
    area = cross.sum() / 2
    moment = (cross[:, None] * (behind + ahead)).sum(axis=0) / 6
    return abs(area), np.sign(area) * moment + abs(area) * first


def _of_runs(mask: dict[str, Any], where: str) -> tuple[float, float]:
    """Centroid of a run-length mask, column by column, without drawing it."""
    height, width = _numbers(mask.get("size"), f"{where}, size", 2)
    counts = mask.get("counts")
    runs = _unpacked(counts, where) if isinstance(counts, str) else _numbers(counts, where)
    ends = np.cumsum(np.array([0.0, *runs]))
    if height < 1 or min(runs, default=-1) < 0 or ends[-1] != height * width:
        raise ValueError(f"{where} has runs that do not fill its size {mask.get('size')}")
    # Runs alternate, background first.
    begin, end = ends[1:-1:2], ends[2::2]
    area = (end - begin).sum()
    if not area:
        raise ValueError(f"{where} is empty: a nucleus has pixels")
    columns, rows = (
        high - low for high, low in zip(_sums(end, height), _sums(begin, height), strict=True)
    )
    return float(columns.sum() / area + 0.5), float(rows.sum() / area + 0.5)


def _sums(count: Float64[np.ndarray, " run"], height: float) -> Float64[np.ndarray, "2 run"]:
    """Sums of the columns, and of the rows, of the first `count` pixels."""
    full, rest = np.divmod(count, height)
    columns = height * full * (full - 1) / 2 + full * rest
    return np.stack([columns, full * height * (height - 1) / 2 + rest * (rest - 1) / 2])


def _unpacked(text: str, where: str) -> list[float]:
    """COCO's compressed run lengths: five bits a character, differences to the run two before."""
    runs: list[float] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits >= 5 * LONGEST_RUN:
            raise ValueError(f"{where}, counts is damaged: export it anew")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (1 << bits) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return runs
