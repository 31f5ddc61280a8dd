"""Cells in a window of a slide at 10x: nuclei, or whatever is stained where cells have none.

A nucleus is a compact spot that absorbs red and green more than its surround does, and blue no
more than red: so do all of Papanicolaou, Giemsa and haematoxylin, and neither eosin, haemoglobin
nor dust. Rings of bubbles and the edge of the coverslip are too long, folds not clear of their
surround; strokes of a pen are known by their width and left with all below. Measures as in detect's
`hematoxylin`, at half its resolution and without its watershed: a patch is foreground by what it
holds, not by each nucleus found.
"""

from dataclasses import dataclass, fields

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, UInt8

from stages.common import focus

DARKEST = 2  # gray values below it are noise
BLUR_UM = 0.4  # sigma, before anything else
RADIUS_UM = (1.8, 10.0)  # of a nucleus, as the circle of equal area
HALF, REACH_UM = 0.5, 4.0  # a nucleus ends at this share of the highest density within reach
GAP_UM, RING_UM = 0.75, 1.5  # its surround begins so far outside, and is so wide
LEAST_ROUND = 0.42  # short over long axis of the ellipse with the same moments
LEAST_FULL = 0.65  # area over that ellipse's
LEAST_CLEAR, NOISE = 2.0, 0.02  # density above the surround over the surround's spread
LEAST_BLUE = 1.05  # red over blue density above the surround
THICK_UM = 2.0  # radius of the smallest thing that counts as a cell without a nucleus
COLOURLESS = 0.75  # share of its highest density that the lowest has, in what is no stain
INK, WIDE_UM = (
    0.5,
    40.0,
)  # density that ink has all over a disk of this radius, which cells have not
NEAR_UM = 15.0  # ragged rims of strokes reach so far
COARSE = 8  # pixels of the window per pixel in which ink is looked for

Colour = Float32[np.ndarray, "height width 3"]
Image = Float32[np.ndarray, "height width"]
Mask = UInt8[np.ndarray, "height width"]
Labels = Int32[np.ndarray, "height width"]
Column = Float64[np.ndarray, " blob"]


@dataclass(frozen=True)
class Blobs:
    """Nuclei, or pieces of what is stained; a row each."""

    x: Column  # centre, pixels, continuous
    y: Column
    area_um2: Column
    blur_um: Column  # of its edges, see stages/common/focus.py; NaN: it has none

    def __getitem__(self, kept: Bool[np.ndarray, " blob"]) -> "Blobs":
        """Some of them."""
        return Blobs(*(getattr(self, column.name)[kept] for column in fields(self)))


@dataclass(frozen=True)
class View:
    """A window as optical density (base 10) above the slide's glass."""

    density: Colour
    highest: Image  # of the channels
    edges: tuple[Image, Image]  # of the highest, see stages/common/focus.py
    um: float  # microns per pixel


def view(pixels: UInt8[np.ndarray, "height width 3"], white: np.ndarray, um: float) -> View:
    """The window's densities; `white` is the light of the glass, 3 values of 0 to 255."""
    table = -np.log10(np.maximum(np.arange(256), DARKEST) / 255).astype(np.float32)
    glass = -np.log10(np.maximum(white, DARKEST) / 255).astype(np.float32)
    density = cv2.GaussianBlur(cv2.LUT(pixels, table) - glass, (0, 0), BLUR_UM / um)
    highest = cv2.max(cv2.max(density[..., 0], density[..., 1]), density[..., 2])
    return View(density, highest, focus.edges(highest, um), um)


def disk(radius_px: float) -> UInt8[np.ndarray, "side side"]:
    """A disk of odd width, at least 3, for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def nuclei(seen: View, least_density: float, gray: bool) -> Blobs:
    """Nuclei, sharp or not.

    Args:
        seen: The window.
        least_density: What a nucleus has above its surround, in red and in green.
        gray: The slide has no colour to tell nuclei by.
    """
    stain = cv2.min(seen.density[..., 0], seen.density[..., 1])
    mask = _spots(stain, seen.um, least_density)
    mask[_ink(seen.highest, seen.um)] = 0
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    return _judged(seen, stain, labels, count, stats[:, cv2.CC_STAT_AREA], least_density, gray)


def _spots(stain: Image, um: float, least_density: float) -> Mask:
    """What rises above an opening by a disk wider than any nucleus, cut at half its height."""
    height, width = stain.shape
    small = (max(1, width // 2), max(1, height // 2))  # the opening is smooth: half will do
    coarse = cv2.resize(stain, small, interpolation=cv2.INTER_AREA)
    kernel = disk(1.1 * RADIUS_UM[1] / um / 2)
    opened = cv2.morphologyEx(coarse, cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_REPLICATE)
    spots = np.maximum(stain - cv2.resize(opened, (width, height)), 0)
    highest = cv2.dilate(cv2.GaussianBlur(spots, (0, 0), 0.6 / um), disk(REACH_UM / um))
    mask = (spots > np.maximum(HALF * highest, least_density)).astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, cross)


def _judged(
    seen: View,
    stain: Image,
    labels: Labels,
    count: int,
    area_px: Int32[np.ndarray, " label"],
    least_density: float,
    gray: bool,
) -> Blobs:
    within = _Sums(labels, count)
    wide = _grown(labels, GAP_UM + RING_UM, seen.um)
    around = _Sums(np.where(_grown(labels, GAP_UM, seen.um) == 0, wide, 0), count)
    contrast = within.mean(stain) - around.mean(stain)
    red, blue = (
        within.mean(seen.density[..., at]) - around.mean(seen.density[..., at]) for at in (0, 2)
    )
    spread = np.sqrt(np.maximum(around.mean(stain**2) - around.mean(stain) ** 2, 0))
    centre, roundness, fullness = within.shape()
    radius = np.sqrt(area_px / np.pi) * seen.um
    kept = (radius >= RADIUS_UM[0]) & (radius <= RADIUS_UM[1])
    kept &= (roundness >= LEAST_ROUND) & (fullness >= LEAST_FULL)
    kept &= (contrast >= least_density) & (contrast >= LEAST_CLEAR * (spread + NOISE))
    kept &= gray | (red >= LEAST_BLUE * blue)
    kept[0] = False  # what is no spot
    rim = _Sums(wide, count)
    blur = focus.blur_um(*(rim.total(image) for image in seen.edges))
    return Blobs(centre[0], centre[1], area_px * seen.um**2.0, blur)[kept]


def _grown(labels: Labels, by_um: float, um: float) -> Labels:
    side = 2 * max(1, round(by_um / um)) + 1
    # OpenCV dilates no int32; float32 is exact up to 2**24 labels.
    grown = cv2.dilate(labels.astype(np.float32), np.ones((side, side), np.uint8))
    return grown.astype(np.int32)


class _Sums:
    """Sums over the pixels of each label, 0 included, where nothing is summed."""

    def __init__(self, labels: Labels, count: int) -> None:
        self._at = np.flatnonzero(labels)
        self._label = labels.reshape(-1)[self._at]
        self._count = count
        self._width = labels.shape[1]
        self._area = np.maximum(np.bincount(self._label, minlength=count), 1)

    def total(self, image: Image) -> Column:
        return np.bincount(self._label, image.reshape(-1)[self._at], minlength=self._count)

    def mean(self, image: Image) -> Column:
        return self.total(image) / self._area

    def shape(self) -> tuple[tuple[Column, Column], Column, Column]:
        """Centre; short over long axis; area over that of the ellipse of equal moments."""
        y, x = np.divmod(self._at, self._width)

        def mean(values: np.ndarray) -> Column:
            return np.bincount(self._label, values, minlength=self._count) / self._area

        centre = mean(x), mean(y)
        x, y = x - centre[0][self._label], y - centre[1][self._label]
        # A pixel is a square, not a point: it adds 1/12 to the second moments.
        xx, yy, xy = mean(x**2) + 1 / 12, mean(y**2) + 1 / 12, mean(x * y)
        half_gap = np.hypot((xx - yy) / 2, xy)
        long, short = (np.sqrt((xx + yy) / 2 + sign * half_gap) for sign in (1, -1))
        return (
            (centre[0] + 0.5, centre[1] + 0.5),
            short / long,
            self._area / (4 * np.pi * long * short),
        )


def cells(seen: View, least_density: float, square_px: int, gray: bool) -> Blobs:
    """What is stained, thicker than a line and no ink, cut into squares; each is one blob.

    Stains have a colour; dust, the rings of bubbles and the coverslip's edge have none.
    """
    low, high = seen.density.min(axis=2), seen.highest
    stained = (high > least_density) & (gray | (low < COLOURLESS * high))
    thick = cv2.morphologyEx(stained.astype(np.uint8), cv2.MORPH_OPEN, disk(THICK_UM / seen.um))
    thick[_ink(high, seen.um)] = 0
    area = block_sums(thick, square_px)
    y, x = np.indices(thick.shape, np.float32) + 0.5
    full = area > 0
    centre = [block_sums(thick * axis, square_px)[full] / area[full] for axis in (x, y)]
    blur = focus.blur_um(*(block_sums(image, square_px)[full] for image in seen.edges))
    return Blobs(*centre, area[full] * seen.um**2, blur)


def _ink(density: Image, um: float) -> Bool[np.ndarray, "height width"]:
    """On and near what is dense over a wide disk: strokes of a pen, labels, black borders."""
    height, width = density.shape
    small = (max(1, width // COARSE), max(1, height // COARSE))
    coarse = cv2.resize(density, small, interpolation=cv2.INTER_AREA)
    wide = disk(WIDE_UM / (um * COARSE))
    opened = cv2.morphologyEx(coarse, cv2.MORPH_OPEN, wide, borderType=cv2.BORDER_REPLICATE)
    ink = cv2.dilate((opened > INK).astype(np.uint8), disk(NEAR_UM / (um * COARSE)))
    return cv2.resize(ink, (width, height), interpolation=cv2.INTER_NEAREST) > 0


def block_sums(image: np.ndarray, side_px: int) -> Float64[np.ndarray, "rows columns"]:
    """Sums over squares of `side_px`; those at the right and the bottom may be cut."""
    rows = np.add.reduceat(image, np.arange(0, image.shape[0], side_px), axis=0, dtype=np.float64)
    return np.add.reduceat(rows, np.arange(0, image.shape[1], side_px), axis=1)
