"""What `stages.detect` asks of a detector: `build(params)` returns one.

`identity(params)` tells without it, and without its libraries, what its `version` would be:
`stages.index` writes that down at every run, so that DVC sees other weights and libraries. It
raises FileNotFoundError without weights, ImportError without the library.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class Detection:
    """The nuclei of one patch."""

    centroid_px: Float32[np.ndarray, "nuclei 2"]  # (x, y); pixel column j covers [j, j + 1)
    radius_um: Float32[np.ndarray, " nuclei"]  # of the circle of equal area, microns
    # 0 to 1, the more certain the higher; to be compared within one detector only:
    #   hematoxylin  q / (1 + q), where q grows with its darkness, roundness and fullness
    #   cellpose     mean over the nucleus of the logistic of the network's cell probability
    #   cellvit      mean over the nucleus of the network's probability of a nucleus
    #   instanseg    1.0 always: its script hands no score over
    score: Float32[np.ndarray, " nuclei"]
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
