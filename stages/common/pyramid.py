"""Whole-slide files through OpenSlide. The only openslide import.

OpenSlide opens every format and says what is damaged. Tiled TIFF is read faster by
`stages.common.tiff`, level by level, once sample regions came out bit for bit as OpenSlide's. At
other levels, and at places between two pixels of a level, where OpenSlide blends neighbours, it
reads itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import Int64, UInt8
from PIL import Image

from stages.common import tiff

FAST_VENDORS = {"aperio", "generic-tiff"}
LARGE_PX = 1 << 20  # from here on a single region is worth the comparison with OpenSlide
SAMPLE_PX = 64


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
        self._tiles = self._open_tiles()
        self._equal: dict[int, bool] = {}  # by level: whether the tiles gave OpenSlide's pixels

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()
        if self._tiles:
            self._tiles.close()

    def read(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels of a region."""
        known = self._equal.get(level, width * height >= LARGE_PX)
        step = round(self.level_downsamples[level])
        if known and min(x0, y0) >= 0 and not (x0 % step or y0 % step) and self._fast(level):
            place = (x0 // step, y0 // step, width, height)
            pixels = self._tiles.region(level, *place, self._background)
            if pixels is not None:
                return pixels
        return self._judged(x0, y0, level, width, height)

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

    def _open_tiles(self) -> tiff.Tiles | None:
        if self.properties["openslide.vendor"] not in FAST_VENDORS:
            return None
        try:
            return tiff.Tiles(self._path, self.level_dimensions)
        except (ValueError, OSError):  # OpenSlide, which did open it, is there to judge
            return None

    def _fast(self, level: int) -> bool:
        if level not in self._equal:
            self._equal[level] = self._tiles is not None and self._agree(level)
        return self._equal[level]

    def _agree(self, level: int) -> bool:
        """Compare around the corners of some tiles; damaged and absent ones are not compared."""
        step = self.level_downsamples[level]
        if step != round(step) or not self._tiles.has(level):
            return False
        compared = 0
        for x, y in self._tiles.samples(level):
            place = (max(0, x - SAMPLE_PX // 2), max(0, y - SAMPLE_PX // 2))
            ours = self._tiles.region(level, *place, SAMPLE_PX, SAMPLE_PX, self._background)
            if ours is None:
                continue
            x0, y0 = (int(at * step) for at in place)
            if not np.array_equal(ours, self._judged(x0, y0, level, SAMPLE_PX, SAMPLE_PX)):
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
