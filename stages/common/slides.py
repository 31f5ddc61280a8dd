"""Open a slide and read it at a resolution given in mpp."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from stages.common import readers
from stages.common.pyramid import Pyramid
from stages.common.slide_files import content_files

# Scanners of nominal 0.25 mpp write 0.2425 to 0.2629; finer than this share is invention.
FINER_SHARE = 0.05
PLAUSIBLE_MPP = (0.02, 40.0)
ANISOTROPY = 0.02  # largest relative difference of mpp along x and y
Region = Callable[[int, int, int, int, int], np.ndarray]  # `read` of a reader
BAND_PX = 1 << 25  # what is read at once to be averaged down: 96 MiB


class Slide:
    """An open slide. Positions are level-0 pixels, sizes are pixels at the mpp asked for.

    Attributes:
        path: The file.
        mpp: Microns per pixel of level 0.
        said_mpp: The same as the file says, along x and y; None: it does not.
        width_px: Width of level 0.
        height_px: Height of level 0.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        """Open the file; `mpp`, when given, overrides what the file says of itself.

        Raises:
            FileNotFoundError: there is no such file, or one that belongs to it is missing.
            ImportError: the package that reads this format is not installed.
            PermissionError: the file may not be read.
            ValueError: the file is empty, damaged, of no known format, or its mpp is not known.
        """
        self.path = path
        self._source = readers.open_file(path)
        self.width_px, self.height_px = self._source.level_dimensions[0]
        self.said_mpp = self._source.mpp
        self.mpp = _checked_mpp(path, mpp if mpp is not None else _mpp_of(self._source.mpp, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; it happens too when the slide is no longer in use."""
        self._source.close()

    def read(
        self, x0: int, y0: int, width_px: int, height_px: int, mpp: float
    ) -> UInt8[np.ndarray, "height_px width_px 3"]:
        """RGB pixels of the region whose top-left is (x0, y0).

        Reads the coarsest level that is not coarser than `mpp` and averages down to it: all at
        once, or in bands that begin at whole pixels where that would be over 32 megapixels.

        Raises:
            ValueError: the file is damaged at this place.
            FileNotFoundError: the file has vanished.
        """
        return self._averaged(self._source.read, (x0, y0), width_px, height_px, mpp)

    def overview(
        self, x0: int, y0: int, width_px: int, height_px: int, mpp: float
    ) -> UInt8[np.ndarray, "height_px width_px 3"]:
        """As `read`, but up to half a pixel of the level away, where that is several times as fast.

        To search a slide at low resolution; patches to keep are read by `patches`.
        """
        source = self._source
        reader = source.overview if isinstance(source, Pyramid) else source.read
        return self._averaged(reader, (x0, y0), width_px, height_px, mpp)

    def patches(
        self, corners: Int64[np.ndarray, "patch 2"], patch_px: int, mpp: float
    ) -> Iterator[UInt8[np.ndarray, "patch_px patch_px 3"]]:
        """The patches whose top-left corners (x0, y0) are given, in that order, as `read` has them.

        Where the corners come row by row, each of a TIFF's tiles is decoded once, and kept until
        the last patch that it touches: 256 MiB at most, whatever the slide's width.

        Raises:
            ValueError: the file is damaged at one of the places.
            FileNotFoundError: the file has vanished.
        """
        level, width, height = self._extent(patch_px, patch_px, mpp)
        source = self._source
        tiled = isinstance(source, Pyramid)
        with source.expecting(corners, level, width, height) if tiled else nullcontext():
            for x0, y0 in corners:
                yield self.read(int(x0), int(y0), patch_px, patch_px, mpp)

    def files(self) -> list[Path]:
        """Every file that holds pixels of the slide."""
        return content_files(self.path)

    def thumbnail(self, longest_px: int) -> UInt8[np.ndarray, "height width 3"]:
        """The whole slide, its longer side at most `longest_px`."""
        scale = max(1.0, max(self.width_px, self.height_px) / longest_px)
        width, height = (max(1, int(side / scale)) for side in (self.width_px, self.height_px))
        return self.read(0, 0, width, height, self.mpp * scale)

    def probe(self) -> None:
        """Read a little at both ends of the file: a truncated slide opens, and fails here.

        Raises:
            ValueError: the file is damaged.
        """
        self.thumbnail(256)
        side = min(256, self.width_px, self.height_px)
        for x0, y0 in ((0, 0), (self.width_px - side, self.height_px - side)):
            self.read(x0, y0, side, side, self.mpp)

    def check_mpp(self, mpp: float) -> None:
        """Refuse a resolution that the slide does not have.

        Raises:
            ValueError: `mpp` is finer than the slide by more than 5 per cent.
        """
        if mpp < self.mpp * (1 - FINER_SHARE):
            raise ValueError(
                f"slide {self.path.name} is {self.mpp:.4g} mpp, and {mpp:g} mpp patches would be "
                f"invented: raise tile.mpp to {math.ceil(self.mpp * 100) / 100:g} or more"
            )

    def _extent(self, width_px: int, height_px: int, mpp: float) -> tuple[int, int, int]:
        """The level to read for regions of this size, and their width and height there."""
        scale = mpp / self.mpp
        fine = [
            level
            for level, downsample in enumerate(self._source.level_downsamples)
            if downsample <= scale * (1 + 1e-3)
        ]
        level = max(fine, default=0)
        shrink = scale / self._source.level_downsamples[level]
        return level, max(1, round(width_px * shrink)), max(1, round(height_px * shrink))

    def _averaged(
        self, reader: Region, corner: tuple[int, int], width_px: int, height_px: int, mpp: float
    ) -> np.ndarray:
        (x0, y0), (level, width, height) = corner, self._extent(width_px, height_px, mpp)
        bands = min(-(-width * height // BAND_PX), height_px)
        if bands < 2 or height < 2 * height_px:
            pixels = self._pixels(reader, x0, y0, level, width, height)
            return _scaled(pixels, width_px, height_px)
        pixels = np.empty((height_px, width_px, 3), np.uint8)
        edges = np.linspace(0, height_px, bands + 1).astype(int)
        tops = np.round(edges * height / height_px).astype(int)
        for band in range(bands):
            y = y0 + round(tops[band] * self._source.level_downsamples[level])
            rows = int(tops[band + 1] - tops[band])
            strip = self._pixels(reader, x0, y, level, width, rows)
            part = pixels[edges[band] : edges[band + 1]]
            part[:] = _scaled(strip, width_px, len(part))
        return pixels

    def _pixels(
        self, reader: Region, x0: int, y0: int, level: int, width: int, height: int
    ) -> np.ndarray:
        try:
            return reader(x0, y0, level, width, height)
        except (ValueError, OSError) as error:
            if not os.path.exists(self.path):  # Path.exists raises where a network share is gone
                raise FileNotFoundError(
                    f"slide {self.path} vanished while it was read: see to its disk or network "
                    "share, and run again"
                ) from None
            place = f"at ({x0}, {y0}), level {level}"
            raise ValueError(
                f"slide {self.path.name} is damaged {place}: {error}; copy it again, or take it "
                "out of the cohort"
            ) from None


def _mpp_of(found: tuple[float, float] | None, path: Path) -> float:
    if found is None:
        raise ValueError(
            f"slide {path.name} has no mpp in its metadata: give it in the labels file, column mpp"
        )
    x, y = found
    if abs(x - y) > ANISOTROPY * max(x, y):
        raise ValueError(f"slide {path.name} is {x} by {y} mpp: its pixels must be square")
    return (x + y) / 2


def _checked_mpp(path: Path, mpp: float) -> float:
    low, high = PLAUSIBLE_MPP
    if not low <= mpp <= high:
        raise ValueError(
            f"slide {path.name} is said to be {mpp:g} mpp: it must lie between {low:g} and "
            f"{high:g}; give the right one in the labels file, column mpp"
        )
    return mpp


def _scaled(pixels: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    if pixels.shape[:2] == (height_px, width_px):
        return pixels
    kind = cv2.INTER_AREA if pixels.shape[1] > width_px else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width_px, height_px), interpolation=kind)
