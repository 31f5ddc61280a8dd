"""Slides for benchmarks/scale.py that cost little to make: plain fields, pyramids of any extent.

Every field has pixels of its own, or the cohort would refuse it as a copy. A pyramid repeats one
drawn square over the whole slide: the file is large, what is in it is cheap.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile
from jaxtyping import UInt8

FIELD_PX = 512
TILE_PX = 256  # of the pyramids, as scanners write them
SQUARE_TILES = 8  # tiles along the side of the square that repeats
BACKGROUND_RGB = (236, 231, 238)
NUCLEUS_RGB = (60, 50, 110)
CELLS_PER_MPX = 60
MPP = 0.5


def draw(side_px: int, rng: np.random.Generator) -> UInt8[np.ndarray, "px px 3"]:
    """Grainy background with dark discs as large as nuclei at 0.5 mpp."""
    picture = np.full((side_px, side_px, 3), BACKGROUND_RGB, np.uint8)
    for x, y in rng.integers(10, side_px - 10, (int(CELLS_PER_MPX * side_px**2 / 1e6), 2)).tolist():
        cv2.circle(picture, (x, y), int(rng.integers(6, 10)), NUCLEUS_RGB, -1)
    grain = rng.integers(-6, 7, picture.shape, dtype=np.int16)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def add_fields(folder: Path, numbers: range) -> None:
    """Write field after field into `folder`, and labels.csv over all that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture = draw(FIELD_PX, np.random.default_rng(number))
        cv2.imwrite(str(folder / f"field-{number:05d}.jpg"), picture[..., ::-1])
    write_labels(folder, "*.jpg")


def write_labels(folder: Path, pattern: str) -> None:
    """Each file a slide and a patient, two classes in turn."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["slide", "label", "mpp"])
        for at, file in enumerate(sorted(folder.glob(pattern))):
            writer.writerow([file.name, ("positive", "negative")[at % 2], MPP])


def write_pyramid(path: Path, side_px: int, seed: int = 0) -> None:
    """A tiled pyramidal JPEG TIFF of `side_px` squared; levels halve down to one tile or so."""
    square = draw(SQUARE_TILES * TILE_PX, np.random.default_rng(seed))
    sides = [side_px]
    while sides[-1] > 2 * TILE_PX:
        sides.append(sides[-1] // 2)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, side in enumerate(sides):
            shrunk = max(TILE_PX, len(square) >> level)
            content = cv2.resize(square, (shrunk, shrunk), interpolation=cv2.INTER_AREA)
            tiff.write(
                _tiles(content, side),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subfiletype=int(level > 0),
                resolution=(1e4 / MPP, 1e4 / MPP),
                resolutionunit="CENTIMETER",
            )


def _tiles(square: np.ndarray, side_px: int) -> Iterator[UInt8[np.ndarray, "px px 3"]]:
    """The tiles of a level, row by row, the square repeated."""
    count, period = -(-side_px // TILE_PX), len(square) // TILE_PX
    parts = [
        [np.ascontiguousarray(part) for part in np.split(row, period, axis=1)]
        for row in np.split(square, period)
    ]
    for row in range(count):
        for column in range(count):
            yield parts[row % period][column % period]
