"""One annotated nucleus, as every reader of annotations gives it, and the numbers it is made of."""

import math
from typing import NamedTuple

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
LARGEST = 1e12  # no position, and no area of an image, is beyond

Extent = tuple[int, int] | None  # width and height that the annotations were made for


class Mark(NamedTuple):
    """One nucleus, or with no point the word that an image was looked at."""

    image: str
    point: tuple[float, float] | None = None
    kind: str | None = None  # its class
    extent_px: Extent = None


def number(text: object, where: str) -> float:
    """A number of pixels, or an error that tells where and what was found instead."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    # Python reads 4_0 as 40, which no annotation tool writes.
    if isinstance(text, bool) or "_" in str(text) or not abs(value) <= LARGEST:
        raise ValueError(f"{where} is {str(text)[:50]!r}: it must be a number, in pixels")
    return value


def whole(text: object, where: str) -> int:
    """A whole number from 0, or such an error."""
    value = number(text, where)
    if value < 0 or value % 1:
        raise ValueError(f"{where} is {str(text)[:50]!r}: it must be a whole number, 0 or above")
    return int(value)


def extent(width: object, height: object, where: str) -> Extent:
    """Width and height as annotations state them; None where one is absent or 0."""
    sides = [
        whole(side or 0, f"{where}, {name}")
        for name, side in (("width", width), ("height", height))
    ]
    return (sides[0], sides[1]) if all(sides) else None


def middle(box: list[float], where: str) -> tuple[float, float]:
    """The centre of a box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise ValueError(f"{where} ends before it begins: {box} must be x0, y0, x1, y1")
    return (x0 + x1) / 2, (y0 + y1) / 2
