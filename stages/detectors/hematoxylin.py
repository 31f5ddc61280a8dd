"""Nuclei as compact spots of high optical density: classical, without weights.

Optical density turns light into something that adds up: what the background, a dim lamp or
cytoplasm contribute is taken away by a top-hat, what remains above threshold is cut at the
watershed of its distance transform, and shape, contrast and colour decide what is a nucleus.
Papanicolaou, Giemsa and haematoxylin make nuclei absorb red and green alike; eosin and haemoglobin
leave red through, so that the lesser of both densities shows nuclei and little else. What decides
is relative to the patch's own threshold, so that pale stains and haze change little.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from skimage.color import hed_from_rgb
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from stages.detectors import Detection, _identity
from stages.detectors._patches import check
from stages.detectors._regions import Colour, Labels, Regions, disk, measure, outlines

VERSION = 2  # raise it when the same input gives other nuclei
LIBRARIES = ("opencv-python-headless", "scikit-image", "scipy")
WORK_MPP = 0.5  # finer patches are shrunk to this: nuclei are 7 px wide and more there
DARKEST = 2  # gray values below it are noise, their density is not told apart
BLUR_UM = 0.4  # sigma, before anything else
OPEN_SHARE = 0.4  # of the smallest radius: thinner bridges and hairs are cut
LEAST_DENSITY = 0.05  # Otsu's histogram begins here: below is glass and noise
DENSITY_STEP = 0.005  # width of the bins of Otsu's histogram, up to density 1.275
HALF = 0.5  # a nucleus ends where its density falls to this share of the highest within REACH_UM
REACH_UM = 4.0
LEAST_ROUND = 0.35  # short over long axis of the ellipse with the same moments
LEAST_FULL = 0.65  # area over that ellipse's
LEAST_QUALITY = 0.55  # see _quality; a sharp round nucleus has 1 and more
IN_CELL, IN_CELL_SHARE = 0.1, 0.85  # a surround so dense is a cell, not glass: red cells lie on
# glass, and so min_blueness is lowered to that share for what lies in a cell

Image = Float32[np.ndarray, "height width"]


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


class _Hematoxylin:
    """See `stages.detectors.Detector`."""

    device = "cpu"

    def __init__(self, params: Params) -> None:
        self.version = identity(params)
        self._params = params

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol."""
        check(patches, mpp)
        return [_detect(patch, mpp, self._params) for patch in patches]


def identity(params: Params) -> str:
    """See `stages.detectors`."""
    return _identity.of("hematoxylin", VERSION, LIBRARIES)


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
    threshold = max(params.min_contrast, params.strictness * _otsu(spots))
    labels, count = _split(_segment(spots, threshold, um, params), um, params)
    found = measure(labels, count, density, um)
    quality = _quality(found, threshold)
    kept = _is_nucleus(found, quality, params)
    return Detection(
        (found.centre[kept] * scale).astype(np.float32),
        found.radius_um[kept].astype(np.float32),
        (quality[kept] / (quality[kept] + 1)).astype(np.float32),
        outlines(labels, kept, scale),
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


def _top_hat(stain: Image, radius_px: float) -> Image:
    """What rises above the opening by a disk wider than any nucleus.

    The opening is smooth on the scale of the disk, so that a shrunk image gives it, in less time.
    """
    height, width = stain.shape
    shrink = max(1, int(radius_px // 5))
    small = (max(1, width // shrink), max(1, height // shrink))
    coarse = cv2.resize(stain, small, interpolation=cv2.INTER_AREA)
    kernel = disk(radius_px / shrink)
    # By name: opening reads a constant border otherwise, and nuclei at the rim lose their height.
    opened = cv2.dilate(_erode(coarse, kernel), kernel, borderType=cv2.BORDER_REPLICATE)
    return np.maximum(stain - cv2.resize(opened, (width, height)), 0)


def _erode(image: Image, kernel: UInt8[np.ndarray, "side side"]) -> Image:
    return cv2.erode(image, kernel, borderType=cv2.BORDER_REPLICATE)


def _otsu(spots: Image) -> float:
    """Otsu's threshold of what lies above LEAST_DENSITY; that itself where nothing does."""
    levels = np.minimum(spots / DENSITY_STEP, 255).astype(np.uint8)
    above = levels[levels > LEAST_DENSITY / DENSITY_STEP]
    if not above.size:
        return LEAST_DENSITY
    return DENSITY_STEP * cv2.threshold(above, 0, 255, cv2.THRESH_OTSU)[0]


def _segment(
    spots: Image, threshold: float, um: float, params: Params
) -> UInt8[np.ndarray, "height width"]:
    """Where nuclei may be: above the threshold, and above half of the height nearby."""
    smooth = cv2.GaussianBlur(spots, (0, 0), 0.6 / um)
    nearby = HALF * cv2.dilate(smooth, disk(REACH_UM / um))
    dense = (spots > np.maximum(nearby, threshold)).astype(np.uint8)
    return cv2.morphologyEx(dense, cv2.MORPH_OPEN, disk(OPEN_SHARE * params.min_radius_um / um))


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
        p_norm=2,  # else the reach is 1.4 times as far along diagonals
    )
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask > 0), len(peaks)


def _quality(found: Regions, threshold: float) -> Float64[np.ndarray, " region"]:
    """How dark, blue, round and full: density above the surround, over the threshold of the patch.

    What red and green have beyond blue counts twice: pale violet nuclei of Giemsa stains are known
    by their colour. Folds, edges of cells and dirt are dark, but neither round nor full.
    """
    lesser, blue = found.above_ring[:, :2].min(axis=1), found.above_ring[:, 2]
    dark = (lesser + np.clip(lesser - blue, 0, threshold)) / threshold
    return np.maximum(dark, 0) * found.fullness * found.axes[:, 1] / found.axes[:, 0]


def _is_nucleus(
    found: Regions, quality: Float64[np.ndarray, " region"], params: Params
) -> Bool[np.ndarray, " region"]:
    blueness = params.min_blueness * np.where(found.ring > IN_CELL, IN_CELL_SHARE, 1.0)
    return (
        (found.radius_um >= params.min_radius_um)
        & (found.radius_um <= params.max_radius_um)
        & (found.axes[:, 1] >= LEAST_ROUND * found.axes[:, 0])
        & (found.fullness >= LEAST_FULL)
        & (quality >= LEAST_QUALITY)
        & (found.above_ring[:, 0] >= blueness * found.above_ring[:, 2])
    )
