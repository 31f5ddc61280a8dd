"""Measures of the regions of a patch that may be nuclei: place, shape, colour, and outline."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, UInt8
from scipy.ndimage import find_objects

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
    ring: Float64[np.ndarray, " region"]  # density of the surround above glass, in green


def disk(radius_px: float) -> UInt8[np.ndarray, "side side"]:
    """A disk of odd width, at least 3, for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def measure(labels: Labels, count: int, density: Colour, um: float) -> Regions:
    """The measures of the regions 1 to `count`; `um`: microns per pixel."""
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
    ring = _surround(labels, count, density, um)
    glass = np.percentile(density[::4, ::4].reshape(-1, 3), 2, axis=0)
    return Regions(
        centre=centre + 0.5,
        radius_um=np.sqrt(area / np.pi) * um,
        axes=axes,
        fullness=area / (np.pi * axes.prod(axis=1)),
        above_ring=inside - ring,
        ring=(ring - glass)[:, 1],
    )


def _surround(
    labels: Labels, count: int, density: Colour, um: float
) -> Float64[np.ndarray, "region 3"]:
    """Mean density in a ring around each region, its neighbours left out."""
    shape = labels.astype(np.float32)  # dilate knows no int32; exact up to 2**24 regions
    taken = cv2.dilate(shape, disk(GAP_UM / um))
    wide = cv2.dilate(shape, disk((GAP_UM + RING_UM) / um))
    y, x = np.nonzero((taken == 0) & (wide > 0))
    region = wide[y, x].astype(np.int64)
    area = np.maximum(np.bincount(region, minlength=count + 1)[1:], 1)
    sums = [np.bincount(region, density[y, x, c], minlength=count + 1)[1:] for c in range(3)]
    return np.stack(sums, axis=1) / area[:, None]


def outlines(
    labels: Labels, kept: Bool[np.ndarray, " region"], scale: Float64[np.ndarray, " 2"]
) -> list[Float32[np.ndarray, "point 2"]]:
    """The rim of each kept region, along the edges of its pixels, up to a quarter of one."""
    boxes = find_objects(labels, max_label=len(kept))
    rims = []
    for region in np.flatnonzero(kept):
        rows, columns = boxes[region]
        mask = (labels[rows, columns] == region + 1).astype(np.uint8)
        # OpenCV's polygon runs through the centres of the rim's pixels: finer ones lie further out.
        fine = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
        pieces, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        rim = (max(pieces, key=cv2.contourArea)[:, 0] + 0.5) / 2
        rims.append(((rim + [columns.start, rows.start]) * scale).astype(np.float32))
    return rims
