"""Zeiss CZI slides that OpenSlide does not open, with more than one plane for example.

Of planes along Z the middle one is read; a slide of several scenes is one picture, in which they
lie where they were scanned.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

COARSEST_PX = 1024  # the shorter side of the last level is below twice this
PIXELS = "Bgr24"
WHITE = (1.0, 1.0, 1.0)


class CziReader:
    """An open CZI file; `stages.readers.Reader` tells what its members mean."""

    def __init__(self, path: Path, library: Any) -> None:
        """Open the file with `library`, the module pylibCZIrw.czi."""
        try:
            self._file = library.CziReader(str(path))
        except RuntimeError as error:
            raise ValueError(f"slide {path.name} is damaged: {error}; copy it again") from None
        whole = self._file.total_bounding_rectangle
        self._left, self._top = whole.x, whole.y
        kinds = set(self._file.pixel_types.values())
        if kinds != {PIXELS}:
            raise ValueError(
                f"slide {path.name} has {' and '.join(sorted(kinds)) or 'no'} pixels: they must be "
                f"{PIXELS}, 8-bit colour; export it as such"
            )
        first, count = self._file.total_bounding_box.get("Z", (0, 1))
        self._plane = {"C": 0, "T": 0, "Z": first + (count - first) // 2}
        halvings = max(0, int(np.log2(min(whole.w, whole.h) / COARSEST_PX)))
        self.level_downsamples = tuple(float(1 << level) for level in range(halvings + 1))
        self.level_dimensions = tuple(
            (whole.w >> level, whole.h >> level) for level in range(halvings + 1)
        )
        self.mpp = _mpp_of(self._file.metadata)

    def read(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels of a region; what was not scanned is white."""
        step = 1 << level
        region = (self._left + x0, self._top + y0, width * step, height * step)
        try:
            pixels = self._file.read(
                region, self._plane, zoom=1 / step, pixel_type=PIXELS, background_pixel=WHITE
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return np.ascontiguousarray(pixels[..., ::-1])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def build(path: Path) -> CziReader:
    """Open a CZI file.

    Raises:
        ImportError: pylibCZIrw is not installed.
        ValueError: the file is damaged, or not of 8-bit colour.
    """
    try:
        from pylibCZIrw import czi
    except ImportError:
        raise ImportError(
            f"slide {path.name} needs pylibCZIrw, which is not installed: pip install '.[czi]'"
        ) from None
    return CziReader(path, czi)


def _mpp_of(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """Microns per pixel along x and y; the file has metres, and 0 for what is not known."""
    scaling = metadata.get("ImageDocument", {}).get("Metadata", {}).get("Scaling") or {}
    found = (scaling.get("Items") or {}).get("Distance") or []
    distances = [found] if isinstance(found, dict) else found  # XML of one element is no list
    metres = {item.get("@Id"): float(item.get("Value") or 0) for item in distances}
    x, y = metres.get("X", 0), metres.get("Y", 0)
    return (x * 1e6, y * 1e6) if x > 0 and y > 0 else None
