"""Patches at the resolution that a network was trained at."""

import cv2
import numpy as np
from jaxtyping import UInt8

ENLARGED = 4.0  # times at most: what is coarser shows no nuclei, and costs memory by the square


def to(
    patch: UInt8[np.ndarray, "height width 3"], mpp: float, network_mpp: float, enlarging: int
) -> tuple[UInt8[np.ndarray, "_ _ 3"], tuple[float, float]]:
    """A patch at `network_mpp`, and the width and height of its pixels in pixels of the patch.

    Args:
        patch: RGB.
        mpp: Microns per pixel of the patch.
        network_mpp: Microns per pixel that the network wants.
        enlarging: OpenCV's way to enlarge, as in the network's own code; to shrink, it is by area.

    Raises:
        ValueError: the patch would have to be enlarged by more than `ENLARGED`.
    """
    check(mpp, network_mpp)
    height, width = patch.shape[:2]
    factor = mpp / network_mpp
    size = max(1, round(width * factor)), max(1, round(height * factor))
    zoom = width / size[0], height / size[1]
    if size == (width, height):
        return patch, zoom
    way = cv2.INTER_AREA if size[0] < width else enlarging
    return cv2.resize(patch, size, interpolation=way), zoom


def check(mpp: float, network_mpp: float) -> None:
    """Refuse patches that are too coarse for the network.

    Raises:
        ValueError: they would have to be enlarged by more than `ENLARGED`.
    """
    if mpp > ENLARGED * network_mpp:
        raise ValueError(
            f"mpp of the patches is {mpp:g}, and they would be enlarged {mpp / network_mpp:.3g} "
            f"times for the {network_mpp:.3g} that the detector sees: it must be "
            f"{ENLARGED * network_mpp:.3g} or less; lower tile.mpp, or mend the slide's mpp"
        )
