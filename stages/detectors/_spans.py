"""One axis of an image cut into overlapping windows of one length, each with a part of its own."""

import numpy as np
from jaxtyping import Float64, Int64


def of(
    length: int, side: int, overlap: int
) -> tuple[Int64[np.ndarray, " window"], int, Float64[np.ndarray, "window 2"]]:
    """Starts of the windows, their length, and begin and end of the part of each.

    Args:
        length: Of the axis.
        side: Length of the windows; an axis that is no longer is one window.
        overlap: Of two windows at least, below `side`.

    Returns:
        Parts meet in the middle of the overlaps; together they are the axis.
    """
    if length <= side:
        return np.zeros(1, np.int64), length, np.array([[0.0, length]])
    count = -(-(length - overlap) // (side - overlap))
    starts = np.linspace(0, length - side, count).round().astype(np.int64)
    edges = np.array([0.0, *((starts[:-1] + side + starts[1:]) / 2), length])
    return starts, side, np.stack([edges[:-1], edges[1:]], axis=1)
