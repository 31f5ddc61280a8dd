"""Nuclei as compact spots of high optical density: classical, without weights, for any stain.

Optical density turns light into something that adds up: what the background, a dim lamp or
cytoplasm contribute is taken away by a top-hat, what remains above threshold is cut at the
watershed of its distance transform, and shape, contrast and colour decide what is a nucleus.
Papanicolaou, Giemsa and haematoxylin make nuclei absorb red and green alike; eosin and haemoglobin
leave red through, so that the lesser of both densities shows nuclei and little else.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import skimage
from jaxtyping import Bool, Float32, Float64, Int32, UInt8
from skimage.color import hed_from_rgb
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from stages.detectors import Detection
from stages.detectors._patches import check

VERSION = 1  # raise it when the same input gives other nuclei
WORK_MPP = 0.5  # finer patches are shrunk to this: nuclei are 7 px wide and more there
DARKEST = 2  # gray values below it are noise, their density is not told apart
BLUR_UM = 0.4  # sigma, before anything else
OPEN_SHARE = 0.4  # of the smallest radius: thinner bridges and hairs are cut
DENSITY_STEP = 0.005  # width of the bins of Otsu's histogram, up to density 1.275
HALF = 0.5  # a nucleus ends where its density falls to this share of the highest within REACH_UM
REACH_UM = 4.0
GAP_UM, RING_UM = 0.75, 1.5  # the surround begins so far outside, and is so wide
RING_SHARE = 0.5  # of min_contrast: least density above the surround, in red and in green
LEAST_ROUND = 0.35  # short over long axis of the ellipse with the same moments
LEAST_FULL = 0.65  # area over that ellipse's

Colour = Float32[np.ndarray, "height width 3"]
Image = Float32[np.ndarray, "height width"]
Labels = Int32[np.ndarray, "height width"]


@dataclass(frozen=True)
class Params:
    """The section `detect.hematoxylin`."""

    channel: Literal["auto", "minimum", "red", "hematoxylin"]  # the density that shows nuclei:
    # auto: at each pixel the lesser of red and green, fits all stains tried; minimum: of all three
    # channels; red: for Giemsa; hematoxylin: by colour deconvolution, for H&E
    min_radius_um: float  # of a nucleus, microns, as the circle of equal area
    max_radius_um: float
    min_contrast: float  # optical density (base 10) of a nucleus above its surround
    strictness: float  # times Otsu's threshold of the patch; lower finds paler nuclei and more else
    min_blueness: float  # red over blue density of a nucleus; red cells are near 0.7
    merge_um: float  # of nuclei, or lobes of one, that are closer than this, the largest is kept

    def __post_init__(self) -> None:
        """Refuse values that no nucleus can meet."""
        for name in ("min_radius_um", "min_contrast", "strictness", "merge_um"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"detect.hematoxylin.{name} is {value}: it must be above 0")
        if not self.min_radius_um < self.max_radius_um < math.inf:
            raise ValueError(
                f"detect.hematoxylin.max_radius_um is {self.max_radius_um}: it must be above "
                f"min_radius_um ({self.min_radius_um})"
            )


@dataclass(frozen=True)
class _Regions:
    """Measures of the regions of one patch, a row a region."""

    centre: Float64[np.ndarray, "region 2"]  # (x, y), working pixels, continuous
    radius_um: Float64[np.ndarray, " region"]
    axes: Float64[np.ndarray, "region 2"]  # long and short half axis, working pixels
    fullness: Float64[np.ndarray, " region"]  # area over that of the ellipse of those axes
    contrast: Float64[np.ndarray, " region"]  # mean height in the top-hat
    above_ring: Float64[np.ndarray, "region 3"]  # density above the surround: red, green, blue


class _Hematoxylin:
    """See `stages.detectors.Detector`."""

    device = "cpu"

    def __init__(self, params: Params) -> None:
        self.version = (
            f"hematoxylin {VERSION}, skimage {skimage.__version__}, cv2 {cv2.__version__}"
        )
        self._params = params

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol."""
        check(patches, mpp)
        return [_detect(patch, mpp, self._params) for patch in patches]


def build(params: Params) -> _Hematoxylin:
    """The detector with these settings."""
    return _Hematoxylin(params)


def _detect(patch: UInt8[np.ndarray, "height width 3"], mpp: float, params: Params) -> Detection:
    height, width = patch.shape[:2]
    factor = min(1.0, mpp / WORK_MPP)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    scale = np.array([width / size[0], height / size[1]])  # working pixel to patch pixel
    um = mpp * math.sqrt(scale[0] * scale[1])  # microns per working pixel
    density = _density(cv2.resize(patch, size, interpolation=cv2.INTER_AREA), um)
    spots = _top_hat(_stain(density, params.channel), 1.1 * params.max_radius_um / um)
    threshold = max(params.min_contrast, params.strictness * _otsu(spots, params.min_contrast / 2))
    labels, count = _split(_segment(spots, threshold, um, params), um, params)
    found = _measure(labels, count, density, spots, um)
    kept = _is_nucleus(found, params)
    contrast = found.contrast[kept]
    return Detection(
        (found.centre[kept] * scale).astype(np.float32),
        found.radius_um[kept].astype(np.float32),
        (contrast / (contrast + threshold)).astype(np.float32),
    )


def _density(image: UInt8[np.ndarray, "height width 3"], um: float) -> Colour:
    """Optical density, base 10, of the slightly blurred image."""
    table = -np.log10(np.maximum(np.arange(256), DARKEST) / 255).astype(np.float32)
    return cv2.GaussianBlur(cv2.LUT(image, table), (0, 0), max(BLUR_UM / um, 0.3))


def _stain(density: Colour, channel: str) -> Image:
    if channel == "minimum":
        return density.min(axis=2)
    if channel == "red":
        return density[..., 0]
    if channel == "hematoxylin":
        return cv2.transform(density, hed_from_rgb[:, :1].T.astype(np.float32))
    return cv2.min(density[..., 0], density[..., 1])


def _disk(radius_px: float) -> UInt8[np.ndarray, "side side"]:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _top_hat(stain: Image, radius_px: float) -> Image:
    """What rises above the opening by a disk wider than any nucleus.

    The opening is smooth on the scale of the disk, so that a shrunk image gives it, in less time.
    """
    height, width = stain.shape
    shrink = max(1, int(radius_px // 5))
    small = (max(1, width // shrink), max(1, height // shrink))
    coarse = cv2.resize(stain, small, interpolation=cv2.INTER_AREA)
    kernel = _disk(radius_px / shrink)
    # By name: opening reads a constant border otherwise, and nuclei at the rim lose their height.
    opened = cv2.dilate(_erode(coarse, kernel), kernel, borderType=cv2.BORDER_REPLICATE)
    return np.maximum(stain - cv2.resize(opened, (width, height)), 0)


def _erode(image: Image, kernel: UInt8[np.ndarray, "side side"]) -> Image:
    return cv2.erode(image, kernel, borderType=cv2.BORDER_REPLICATE)


def _otsu(spots: Image, floor: float) -> float:
    """Otsu's threshold of what lies above `floor`; the floor where nothing does."""
    levels = np.minimum(spots / DENSITY_STEP, 255).astype(np.uint8)
    above = levels[levels > floor / DENSITY_STEP]
    if not above.size:
        return floor
    return DENSITY_STEP * cv2.threshold(above, 0, 255, cv2.THRESH_OTSU)[0]


def _segment(
    spots: Image, threshold: float, um: float, params: Params
) -> UInt8[np.ndarray, "height width"]:
    """Where nuclei may be: above the threshold, and above half of the height nearby."""
    smooth = cv2.GaussianBlur(spots, (0, 0), 0.6 / um)
    nearby = HALF * cv2.dilate(smooth, _disk(REACH_UM / um))
    dense = (spots > np.maximum(nearby, threshold)).astype(np.uint8)
    return cv2.morphologyEx(dense, cv2.MORPH_OPEN, _disk(OPEN_SHARE * params.min_radius_um / um))


def _split(
    mask: UInt8[np.ndarray, "height width"], um: float, params: Params
) -> tuple[Labels, int]:
    """Cut touching nuclei apart, one region around each maximum of the distance to the edge."""
    distance = cv2.GaussianBlur(
        cv2.distanceTransform(mask, cv2.DIST_L2, 5), (0, 0), max(0.8, 0.5 / um)
    )
    peaks = peak_local_max(
        distance,
        min_distance=max(1, round(params.merge_um / um)),
        threshold_abs=0.5 * params.min_radius_um / um,
        exclude_border=False,
    )
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask > 0), len(peaks)


def _measure(labels: Labels, count: int, density: Colour, spots: Image, um: float) -> _Regions:
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
    return _Regions(
        centre=centre + 0.5,
        radius_um=np.sqrt(area / np.pi) * um,
        axes=axes,
        fullness=area / (np.pi * axes.prod(axis=1)),
        contrast=mean(spots[y, x]),
        above_ring=inside - _surround(labels, count, density, um),
    )


def _surround(
    labels: Labels, count: int, density: Colour, um: float
) -> Float64[np.ndarray, "region 3"]:
    """Mean density in a ring around each region, its neighbours left out."""
    shape = labels.astype(np.float32)  # dilate knows no int32; exact up to 2**24 regions
    taken = cv2.dilate(shape, _disk(GAP_UM / um))
    wide = cv2.dilate(shape, _disk((GAP_UM + RING_UM) / um))
    y, x = np.nonzero((taken == 0) & (wide > 0))
    region = wide[y, x].astype(np.int64)
    area = np.maximum(np.bincount(region, minlength=count + 1)[1:], 1)
    sums = [np.bincount(region, density[y, x, c], minlength=count + 1)[1:] for c in range(3)]
    return np.stack(sums, axis=1) / area[:, None]


def _is_nucleus(found: _Regions, params: Params) -> Bool[np.ndarray, " region"]:
    red, green, blue = found.above_ring.T
    return (
        (found.radius_um >= params.min_radius_um)
        & (found.radius_um <= params.max_radius_um)
        & (found.axes[:, 1] >= LEAST_ROUND * found.axes[:, 0])
        & (found.fullness >= LEAST_FULL)
        & (np.minimum(red, green) >= RING_SHARE * params.min_contrast)
        & (red >= params.min_blueness * blue)
    )
