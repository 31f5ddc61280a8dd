"""Whole-slide files through OpenSlide. The only openslide import.

OpenSlide opens every format and says what is damaged. Tiled TIFF is read faster by
`stages.common.tiff`, level by level, once sample regions came out bit for bit as OpenSlide's. At
other levels, and at places between two pixels of a level, where OpenSlide blends neighbours, it
reads itself.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import Int64, UInt8
from PIL import Image

from stages.common import tiff

FAST_VENDORS = {"aperio", "generic-tiff"}
LARGE_PX = 1 << 21  # read from a level before its comparison with OpenSlide is worth its while
SAMPLE_PX = 64
BLENDING = 3  # grey levels by which cairo's blend of four pixels may differ from the exact one


class Pyramid:
    """A slide that OpenSlide knows; `stages.readers.Reader` tells what its members mean."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ValueError: it is damaged, or of a variant that OpenSlide does not read.
        """
        self._path = path
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise ValueError(str(error)) from None
        self.level_dimensions = self._slide.level_dimensions
        self.level_downsamples = self._slide.level_downsamples
        self.properties = dict(self._slide.properties)
        found = [self.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.mpp = None if None in found else (float(found[0]), float(found[1]))
        colour = self.properties.get("openslide.background-color", "ffffff")
        self._background = tuple(bytes.fromhex(colour))
        self._read_px: dict[int, int] = defaultdict(int)  # by level
        self._equal: dict[int, bool] = {}  # by level: whether the tiles gave OpenSlide's pixels
        self._alike: dict[int, bool] = {}  # by level: whether they did when blended as it does

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()
        if tiles := self.__dict__.get("_tiles"):
            tiles.close()

    def read(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels of a region."""
        self._read_px[level] += width * height
        step = round(self.level_downsamples[level])
        known = self._equal.get(level, self._read_px[level] >= LARGE_PX)
        if known and min(x0, y0) >= 0 and not (x0 % step or y0 % step) and self._fast(level):
            place = (x0 // step, y0 // step, width, height)
            pixels = self._tiles.region(level, *place, self._background)
            if pixels is not None:
                return pixels
        return self._judged(x0, y0, level, width, height)

    def overview(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """As `read`, but from the nearest whole pixel of the level, where the tiles are readable.

        Where a level's pixels are no whole number of level-0 pixels wide, `read` is OpenSlide's
        blend of four neighbours, which takes several times as long.
        """
        step = self.level_downsamples[level]
        if step == round(step) or min(x0, y0) < 0 or not self._near(level):
            return self.read(x0, y0, level, width, height)
        place = (round(x0 / step), round(y0 / step), width, height)
        pixels = self._tiles.region(level, *place, self._background)
        return self.read(x0, y0, level, width, height) if pixels is None else pixels

    @contextmanager
    def expecting(
        self, corners: Int64[np.ndarray, "region 2"], level: int, width: int, height: int
    ) -> Iterator[None]:
        """Keep tiles until the last of these regions, given by level-0 corners, has used them."""
        step = round(self.level_downsamples[level])
        fast = self._fast(level)
        regions = (level, corners // step, width, height)
        with self._tiles.expecting(*regions) if fast else nullcontext():
            yield

    @cached_property
    def _tiles(self) -> tiff.Tiles | None:
        """The file's tiles, opened when they are first asked for."""
        if self.properties["openslide.vendor"] not in FAST_VENDORS:
            return None
        try:
            return tiff.Tiles(self._path, self.level_dimensions)
        except Exception:  # of any kind, where a tag is damaged; OpenSlide, which opened it, judges
            return None

    def _fast(self, level: int) -> bool:
        """Whether the tiles have OpenSlide's pixels."""
        if level not in self._equal:
            whole = self.level_downsamples[level] == round(self.level_downsamples[level])
            self._equal[level] = whole and self._agree(level, 0)
        return self._equal[level]

    def _near(self, level: int) -> bool:
        """Whether the tiles, blended, have OpenSlide's pixels but for how it rounds."""
        if level not in self._alike:
            self._alike[level] = self._agree(level, BLENDING)
        return self._alike[level]

    def _agree(self, level: int, tolerance: float) -> bool:
        """Compare around the corners of some tiles; damaged and absent ones are not compared."""
        if self._tiles is None or not self._tiles.has(level):
            return False
        step, compared = self.level_downsamples[level], 0
        for corner in self._tiles.samples(level):
            x0, y0 = (int(max(0, at - SAMPLE_PX // 2) * step) for at in corner)
            x, y = int(x0 / step), int(y0 / step)
            ours = self._tiles.region(level, x, y, *[SAMPLE_PX + 1] * 2, self._background)
            if ours is None:
                continue
            blended = _blend(ours, x0 / step - x, y0 / step - y)
            theirs = self._judged(x0, y0, level, SAMPLE_PX, SAMPLE_PX)
            if np.abs(blended - theirs).max() > tolerance:
                return False
            compared += 1
        return compared >= tiff.SAMPLES

    def _judged(self, x0: int, y0: int, level: int, width: int, height: int) -> np.ndarray:
        """The region as OpenSlide reads it."""
        try:
            region = self._slide.read_region((x0, y0), level, (width, height))
        except openslide.OpenSlideError as error:
            raise ValueError(str(error)) from None
        pixels = np.asarray(region)
        if pixels[..., 3].min() == 255:
            return np.ascontiguousarray(pixels[..., :3])
        plain = Image.new("RGBA", region.size, (*self._background, 255))
        return np.asarray(Image.alpha_composite(plain, region).convert("RGB"))


def knows(path: Path) -> bool:
    """Whether OpenSlide takes the file for one of its formats."""
    return openslide.OpenSlide.detect_format(path) is not None


def _blend(pixels: np.ndarray, right: float, down: float) -> np.ndarray:
    """The picture moved by parts of a pixel, bilinear; one row and one column less."""
    beside = pixels[:, :-1] * (1 - right) + pixels[:, 1:] * right
    return beside[:-1] * (1 - down) + beside[1:] * down
