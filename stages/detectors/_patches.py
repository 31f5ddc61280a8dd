"""The one rule for what every detector takes: uint8 RGB, and a scale."""

import math

import numpy as np


def check(patches: np.ndarray, mpp: float) -> None:
    """Refuse anything but a stack of uint8 RGB patches with a positive scale; nothing is converted.

    Raises:
        ValueError: gray, RGBA, 16-bit or single images; an mpp that is not a positive number.
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or patches.dtype != np.uint8:
        found = f"{patches.dtype} {list(patches.shape)}"
        raise ValueError(
            f"patches are {found}: they must be uint8 [patch, height, width, 3], RGB; stack gray "
            "three times, drop alpha, scale 16 bits to 8"
        )
    if not 0 < mpp < math.inf:
        raise ValueError(f"mpp is {mpp}: it must be above 0, microns per pixel of the patches")
