"""COCO annotations, read into one point a nucleus: polygons, run lengths or boxes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from skimage.measure import grid_points_in_poly

from stages.common.marks import Extent, Mark, extent, middle, number, whole

LONGEST_RUN = 12  # characters of five bits of one run length
GRID = 101  # points a side by which the centroid of an outline that crosses itself is found
MOST_CORNERS = 2000  # of an outline whose edges are compared in pairs


def read(source: Path) -> Iterator[Mark]:
    """The marks of a COCO file: the centroid of the segmentation, of the box where there is none.

    Raises:
        ValueError: the file is no COCO, or wrong at a place that is named.
    """
    content = _json(source)
    images = _by_id(source, content, "images", "file_name")
    names = _by_id(source, content, "categories", "name") if content.get("categories") else {}
    if len(set(images.values())) < len(images):
        raise ValueError(f"{source} lists an image twice: each file_name must be there once")
    for name, entry in zip(images.values(), content["images"], strict=True):
        sides = entry.get("width"), entry.get("height")
        yield Mark(name, extent_px=extent(*sides, f"{source}, image {name}"))
    for at, entry in enumerate(content["annotations"]):
        where = f"{source}, annotations[{at}]"
        image = images.get(_key(entry, "image_id", where))
        if image is None:
            raise ValueError(f"{where}: image_id is {entry['image_id']!r}: no image has that id")
        kind = names.get(_key(entry, "category_id", where)) if names else None
        if names and kind is None:
            raise ValueError(f"{where}: category_id {entry['category_id']!r} is of no category")
        point, extent_px = _point(entry, where)
        yield Mark(image, point, kind, extent_px)


def _json(source: Path) -> dict[str, Any]:
    try:
        content = json.loads(source.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON: {error}; export it anew") from None
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{source} has no list {name!r}: it must be COCO")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A map, each key of which is there once: JSON would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


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
    if isinstance(key, float) and key.is_integer():
        return int(key)  # of tables whose columns had gaps
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise ValueError(f"{where} has no {name}: it must be a whole number or a text")
    return key


def _point(entry: dict[str, Any], where: str) -> tuple[tuple[float, float], Extent]:
    """Where the nucleus is, and of run lengths the extent of the image."""
    if entry.get("iscrowd") and not isinstance(entry.get("segmentation"), dict):
        raise ValueError(f"{where} is a crowd, not one nucleus: take it out")
    outline = entry.get("segmentation")
    if outline and isinstance(outline, dict):
        return _of_runs(outline, f"{where}, segmentation")
    if outline and outline != [[]]:
        return _of_polygons(outline, f"{where}, segmentation"), None
    x0, y0, width, height = _numbers(entry.get("bbox"), f"{where}, bbox", 4)
    return middle([x0, y0, x0 + width, y0 + height], f"{where}: the box"), None


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
    """Area, and area times centroid: the shoelace formula, around the first corner.

    Where an outline crosses itself, parts of that sum cancel: points inside it serve instead, and
    so they do where it has too many edges to tell.
    """
    if len(corners) > MOST_CORNERS or _crosses(corners):
        return _area_by_points(corners)
    first = corners[0]
    ahead, behind = np.roll(corners, -1, axis=0) - first, corners - first
    cross = behind[:, 0] * ahead[:, 1] - ahead[:, 0] * behind[:, 1]
    area = cross.sum() / 2
    moment = (cross[:, None] * (behind + ahead)).sum(axis=0) / 6
    return abs(area), np.sign(area) * moment + abs(area) * first


def _crosses(corners: Float64[np.ndarray, "corner 2"]) -> bool:
    """Whether two edges cross, each with its ends on both sides of the other."""
    begin, along = corners, np.roll(corners, -1, axis=0) - corners
    apart = begin[None] - begin[:, None]  # [edge, other]: from the edge's begin to the other's
    side = along[:, None, 0] * apart[..., 1] - along[:, None, 1] * apart[..., 0]
    ends = np.roll(side, -1, axis=1)
    split = (np.sign(side) * np.sign(ends)) < 0
    return bool((split & split.T).any())


def _area_by_points(
    corners: Float64[np.ndarray, "corner 2"],
) -> tuple[float, Float64[np.ndarray, " 2"]]:
    low, high = corners.min(axis=0), corners.max(axis=0)
    step = (high - low) / GRID
    inside = np.argwhere(grid_points_in_poly((GRID, GRID), (corners - low) / step - 0.5))
    area = len(inside) * step.prod()
    return float(area), (low + (inside + 0.5) * step).sum(axis=0) * step.prod()


def _of_runs(mask: dict[str, Any], where: str) -> tuple[tuple[float, float], tuple[int, int]]:
    """Centroid of a run-length mask, column by column, without drawing it; width and height."""
    size = mask.get("size")
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError(f"{where}, size is {str(size)[:50]}: it must be height and width")
    height, width = (whole(side, f"{where}, size") for side in size)
    counts = mask.get("counts")
    runs = _unpacked(counts, where) if isinstance(counts, str) else _whole(counts, where)
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
    return (
        (float(columns.sum() / area + 0.5), float(rows.sum() / area + 0.5)),
        (width, height),
    )


def _whole(values: Any, where: str) -> list[int]:
    if not isinstance(values, list):
        raise ValueError(f"{where}, counts is {str(values)[:50]}: it must be run lengths")
    return [whole(value, f"{where}, counts") for value in values]


def _sums(count: Float64[np.ndarray, " run"], height: int) -> Float64[np.ndarray, "2 run"]:
    """Sums of the columns, and of the rows, of the first `count` pixels."""
    full, rest = np.divmod(count, height)
    columns = height * full * (full - 1) / 2 + full * rest
    return np.stack([columns, full * height * (height - 1) / 2 + rest * (rest - 1) / 2])


def _unpacked(text: str, where: str) -> list[int]:
    """COCO's compressed run lengths: five bits a character, differences to the run two before."""
    runs: list[int] = []
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
