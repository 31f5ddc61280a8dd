"""Measures of the regions of a patch that may be nuclei: place, shape, colour, and surround."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

GAP_UM, RING_UM = 0.75, 1.5  # the surround begins so far outside, and is so wide

Colour = Float32[np.ndarray, "height width 3"]
Labels = Int32[np.ndarray, "height width"]


@dataclass(frozen=True)
class Regions:
    """Measures of the regions of one patch, a row a region."""

    centre: Float64[np.ndarray, "region 2"]  # (x, y), working pixels, continuous
    radius_um: Float64[np.ndarray, " region"]
    axes: Float64[np.ndarray, "region 2"]  # long and short half axis, working pixels
    fullness: Float64[np.ndarray, " region"]  # area over that of the ellipse of those axes
    above_ring: Float64[np.ndarray, "region 3"]  # density above the surround: red, green, blue
    ring: Float64[np.ndarray, " region"]  # density of the surround, in green
    spread: Float64[np.ndarray, " region"]  # standard deviation there, of the lesser of red, green

    @property
    def contrast(self) -> Float64[np.ndarray, " region"]:
        """Density above the surround in red or green, whichever is less; at least 0."""
        return np.maximum(self.above_ring[:, :2].min(axis=1), 0)


def disk(radius_px: float) -> UInt8[np.ndarray, "side side"]:
    """A disk of odd width, at least 3, for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def measure(labels: Labels, count: int, density: Colour, um: float) -> Regions:
    """The measures of the regions 1 to `count`; density above glass, `um`: microns per pixel."""
    y, x = np.nonzero(labels)
    region = labels[y, x]
    area = np.maximum(np.bincount(region, minlength=count + 1)[1:], 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, values, minlength=count + 1)[1:] / area

    centre = np.stack([mean(x), mean(y)], axis=1)
    away_x, away_y = x - centre[region - 1, 0], y - centre[region - 1, 1]
    # A pixel is a square, not a point: it adds 1/12 to the second moments.
    xx, yy, xy = mean(away_x**2) + 1 / 12, mean(away_y**2) + 1 / 12, mean(away_x * away_y)
    half_gap = np.hypot((xx - yy) / 2, xy)
    variance = np.stack([(xx + yy) / 2 + half_gap, (xx + yy) / 2 - half_gap], axis=1)
    axes = 2 * np.sqrt(np.maximum(variance, 1 / 12))
    inside = np.stack([mean(density[y, x, channel]) for channel in range(3)], axis=1)
    ring, spread = _surround(labels, count, density, um)
    return Regions(
        centre=centre + 0.5,
        radius_um=np.sqrt(area / np.pi) * um,
        axes=axes,
        fullness=area / (np.pi * axes.prod(axis=1)),
        above_ring=inside - ring,
        ring=ring[:, 1],
        spread=spread,
    )


def _surround(
    labels: Labels, count: int, density: Colour, um: float
) -> tuple[Float64[np.ndarray, "region 3"], Float64[np.ndarray, " region"]]:
    """Mean density in a ring around each region, its neighbours left out, and how it varies."""
    shape = labels.astype(np.float32)  # dilate knows no int32; exact up to 2**24 regions
    taken = cv2.dilate(shape, disk(GAP_UM / um))
    wide = cv2.dilate(shape, disk((GAP_UM + RING_UM) / um))
    y, x = np.nonzero((taken == 0) & (wide > 0))
    region = wide[y, x].astype(np.int64)
    area = np.maximum(np.bincount(region, minlength=count + 1)[1:], 1)
    around = density[y, x]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, values, minlength=count + 1)[1:] / area

    lesser = around[:, :2].min(axis=1)
    variance = mean(lesser**2) - mean(lesser) ** 2
    means = np.stack([mean(around[:, channel]) for channel in range(3)], axis=1)
    return means, np.sqrt(np.maximum(variance, 0))
