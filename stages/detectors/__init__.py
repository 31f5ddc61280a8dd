"""What `stages.detect` asks of a detector: `build(params)` returns one."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class Detection:
    """The nuclei of one patch."""

    centroid_px: Float32[np.ndarray, "nuclei 2"]  # (x, y); pixel column j covers [j, j + 1)
    radius_um: Float32[np.ndarray, " nuclei"]  # of the circle of equal area, microns
    score: Float32[np.ndarray, " nuclei"]  # 0 to 1, the more certain the higher
    # One closed polygon a nucleus, (x, y) as above, for figures; None: the detector gives none.
    outline_px: list[Float32[np.ndarray, "point 2"]] | None = None


class Detector(Protocol):
    """Finds nuclei. What it finds in a patch depends on that patch, mpp and params alone."""

    version: str  # algorithm, library and digest of the weights; part of the cache key
    device: str  # where it runs: cpu, cuda or cuda:<i>

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch.

        Args:
            patches: RGB.
            mpp: Microns per pixel of the patches.

        Raises:
            ValueError: the patches are not uint8 RGB, or mpp is not positive.
        """
        ...
