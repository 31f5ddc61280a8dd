"""What `stages/readers/<suffix>.py` offers: `build(path)` opens a `.<suffix>` file as a reader.

It is asked where OpenSlide does not open a file. `build` raises ImportError, naming the package,
where that is not installed, and ValueError where the file is damaged.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8


class Reader(Protocol):
    """An open slide, a pyramid of levels from fine to coarse."""

    level_dimensions: Sequence[tuple[int, int]]  # (width, height), pixels
    level_downsamples: Sequence[float]  # level-0 pixels per pixel; of level 0: 1
    mpp: tuple[float, float] | None  # microns per pixel of level 0 along x and y; None: not known

    def read(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels of a region; what was never scanned has the slide's background colour.

        Args:
            x0: Left edge in level-0 pixels.
            y0: Top edge in level-0 pixels.
            level: Where to read.
            width: In pixels of that level.
            height: In pixels of that level.

        Raises:
            ValueError: the file is damaged at this place.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...
