"""Regions of a patch that may be nuclei: cut out, measured, and the best of overlapping ones."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import cv2
import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt8
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

GAP_UM, RING_UM = 0.75, 1.5  # the surround begins so far outside, and is so wide

OPEN_SHARE = 0.4  # of the smallest radius: thinner bridges and hairs are cut
CLOSEST = 1.8  # smallest radii between the centres of two nuclei, at least
REACH_UM = 4.0  # how far the height nearby is looked for

Image = Float32[np.ndarray, "height width"]
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
    contrast: Float64[np.ndarray, " region"]  # the same of the lesser of red and green; at least 0
    ring: Float64[np.ndarray, " region"]  # density of the surround, in green
    cell: Float64[np.ndarray, " region"]  # the same less its standard deviation: what is all around
    spread: Float64[np.ndarray, " region"]  # standard deviation there, of the lesser of red, green


def disk(radius_px: float) -> UInt8[np.ndarray, "side side"]:
    """A disk of odd width, at least 3, for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def cut(
    spots: Image, shares: Sequence[float], um: float, min_contrast: float, min_radius_um: float
) -> list[tuple[Labels, int]]:
    """Where nuclei may be: above the least contrast and a share of the height nearby.

    Args:
        spots: Density that rises above the background.
        shares: Of the highest density within REACH_UM.
        um: Microns per pixel.
        min_contrast: Density.
        min_radius_um: Of a nucleus.

    Returns:
        Of each share: regions, numbered from 1, those that touch apart; and how many there are.
    """
    smooth = cv2.GaussianBlur(spots, (0, 0), 0.6 / um)
    nearby = cv2.dilate(smooth, disk(REACH_UM / um))
    opening = disk(OPEN_SHARE * min_radius_um / um)
    cuts = []
    for share in shares:
        dense = (spots > np.maximum(share * nearby, min_contrast)).astype(np.uint8)
        opened = cv2.morphologyEx(dense, cv2.MORPH_OPEN, opening)
        cuts.append(_split(opened, min_radius_um / um, max(0.8, 0.5 / um)))
    return cuts


def _split(
    mask: UInt8[np.ndarray, "height width"], least_px: float, blur_px: float
) -> tuple[Labels, int]:
    """Cut touching nuclei apart, one region around each maximum of the distance to the edge."""
    distance = cv2.GaussianBlur(cv2.distanceTransform(mask, cv2.DIST_L2, 5), (0, 0), blur_px)
    peaks = peak_local_max(
        distance,
        min_distance=max(1, round(CLOSEST * least_px)),
        threshold_abs=0.5 * least_px,
        exclude_border=False,
        p_norm=2,  # else the reach is 1.4 times as far along diagonals
    )
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask > 0), len(peaks)


def measure(labels: Labels, count: int, density: Colour, um: float) -> Regions:
    """The measures of the regions 1 to `count`; density above glass, `um`: microns per pixel."""
    at = np.flatnonzero(labels)
    y, x = np.divmod(at, labels.shape[1])
    region = labels.ravel()[at]
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
    inside = np.stack([mean(one) for one in _channels(density.reshape(-1, 3)[at])], axis=1)
    ring, spread = _surround(labels, count, density, um)
    return Regions(
        centre=centre + 0.5,
        radius_um=np.sqrt(area / np.pi) * um,
        axes=axes,
        fullness=area / (np.pi * axes.prod(axis=1)),
        above_ring=(inside - ring)[:, :3],
        contrast=np.maximum(inside - ring, 0)[:, 3],
        ring=ring[:, 1],
        cell=ring[:, 1] - spread[:, 1],
        spread=spread[:, 3],
    )


def _surround(
    labels: Labels, count: int, density: Colour, um: float
) -> tuple[Float64[np.ndarray, "region 4"], Float64[np.ndarray, "region 4"]]:
    """Mean and deviation of `_channels` in a ring around each region, its neighbours left out."""
    shape = labels.astype(np.float32)  # dilate knows no int32; exact up to 2**24 regions
    taken = cv2.dilate(shape, disk(GAP_UM / um))
    wide = cv2.dilate(shape, disk((GAP_UM + RING_UM) / um))
    at = np.flatnonzero((taken == 0) & (wide > 0))
    region = wide.ravel()[at].astype(np.int64)
    area = np.maximum(np.bincount(region, minlength=count + 1)[1:], 1)
    around = density.reshape(-1, 3)[at]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, values, minlength=count + 1)[1:] / area

    channels = _channels(around)
    means = np.stack([mean(one) for one in channels], axis=1)
    variance = np.stack([mean(one**2) for one in channels], axis=1) - means**2
    return means, np.sqrt(np.maximum(variance, 0))


def _channels(density: Float32[np.ndarray, "pixel 3"]) -> list[Float32[np.ndarray, " pixel"]]:
    """Red, green, blue, and at each pixel the lesser of red and green."""
    return [*density.T, density[:, :2].min(axis=1)]


def join(levels: list[Regions]) -> Regions:
    """The rows of all, one below the other."""
    columns = (field.name for field in fields(Regions))
    return Regions(*(np.concatenate([getattr(one, name) for one in levels]) for name in columns))


def best(
    cuts: list[tuple[Labels, int]], worth: Float64[np.ndarray, " region"]
) -> tuple[Labels, Int64[np.ndarray, " kept"]]:
    """Regions that share no pixel, those of the highest worth first.

    Args:
        cuts: Regions at each threshold, and how many there are.
        worth: Of the regions of all thresholds, see `join`; those of 0 are not wanted.

    Returns:
        The regions kept, numbered one higher than their rows, and the rows.
    """
    wanted = np.concatenate([[False], worth > 0])
    numbers = np.where(wanted, np.arange(len(wanted)), 0).astype(np.int32)
    rows, begin = [], 1
    for labels, count in cuts:
        rows.append(np.concatenate([numbers[:1], numbers[begin : begin + count]])[labels])
        begin += count
    rivals: list[list[int]] = [[] for _ in wanted]
    for first, second in combinations(rows, 2):
        both = np.flatnonzero((first > 0) & (second > 0))
        pairs = first.ravel()[both] * np.int64(len(wanted)) + second.ravel()[both]
        for a, b in zip(*np.divmod(np.unique(pairs), len(wanted)), strict=True):
            rivals[a].append(b)
            rivals[b].append(a)
    for row in np.argsort(-worth, kind="stable") + 1:
        if wanted[row]:
            wanted[rivals[row]] = False
    kept = np.where(wanted, numbers, 0)
    return np.max([kept[one] for one in rows], axis=0), np.flatnonzero(wanted[1:])
