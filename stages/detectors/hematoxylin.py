"""Nuclei as compact spots of high optical density: classical, without weights.

Optical density turns light into something that adds up: what the lamp, the glass and cytoplasm
contribute is taken away by the patch's own glass level and a top-hat. What remains is cut out at
two thresholds, of which the higher finds nuclei in cells almost as dark as they are, touching
nuclei are cut apart at the watershed of their distance transform, and each region is judged by
itself: how far it stands out from its own surround, how round, full and blue it is, and how dark
beside what stands out most clearly in the patch. A few dark nuclei therefore do not hide pale ones.
Of regions that overlap the best is kept, as in Arteta et al., Learning to Detect Cells Using
Non-overlapping Extremal Regions, MICCAI 2012, but judged without learning. What lies in one cell
with stain in between is united: lobes of one nucleus.

Papanicolaou, Giemsa and haematoxylin make nuclei absorb red and green alike; eosin and haemoglobin
leave red through, so that the lesser of both densities shows nuclei and little else. Within a cell
that is stained all around, little blueness is asked: pyknotic nuclei of eosinophilic cells have
little, and red cells lie on glass. Out of reach: patches without light, in which nothing is found;
stains that leave red or green through (Feulgen, DAB), as their nuclei look like red cells, until
`min_blueness` is lowered, where there are no red cells; red cells of gray patches, where there is
no colour to tell them by; and haze or stain so pale that nuclei are fainter than `min_contrast`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float64, UInt8
from skimage.color import hed_from_rgb

from stages.detectors import Detection, _identity
from stages.detectors._lobes import detection, unite
from stages.detectors._patches import check
from stages.detectors._regions import Colour, Image, Regions, best, cut, disk, join, measure

VERSION = 4  # raise it when the same input gives other nuclei
LIBRARIES = ("opencv-python-headless", "scikit-image", "scipy")
WORK_MPP = 0.5  # finer patches are shrunk to this: nuclei are 7 px wide and more there
MOST_RADIUS_UM = 50.0  # wider disks cost too much, and no nucleus needs them
LIT = 32  # gray values up to here, of the brightest in red and green, are no light: noise
DARKEST = 2  # gray values below it are noise, their density is not told apart
BLUR_UM = 0.4  # sigma, before anything else
GLASS = 2  # percentile of the patch's density that is taken for glass
SHARES = 0.5, 0.7  # a nucleus ends where its density falls to such a share of the highest nearby
PREFER = 0.9  # worth of a region of the higher share, beside the one that it lies in
LEAST_ROUND = 0.35  # short over long axis of the ellipse with the same moments
LEAST_FULL = 0.65  # area over that ellipse's
NOISE, NOISE_SHARE = 0.01, 0.03  # no surround is taken to be more even than this density, nor
# than this share of the patch's highest
GRAY = 0.1  # channels that differ by less than this share of the patch's highest density: no colour
STANDS_OUT = 2.2  # contrast over the spread of the surround, of a nucleus of quality 1
SURE = 2.6  # contrast over spread, times shape, of those that tell how dark the patch's nuclei are
BLUE = 0.5  # weight of the contrast that blue lacks
IN_CELL, IN_DARK_CELL = (0.35, 0.8), (0.8, 0.4)  # what has so much of its contrast all around it
# lies in a cell, not on glass as red cells do: min_blueness is lowered to the second share for it


@dataclass(frozen=True)
class Params:
    """The section `detect.hematoxylin`."""

    channel: Literal["auto", "minimum", "red", "hematoxylin"]  # the density that shows nuclei:
    # auto: at each pixel the lesser of red and green, fits all stains tried; minimum: of all three
    # channels; red: for Giemsa; hematoxylin: by colour deconvolution, for H&E
    min_radius_um: float  # of a nucleus, microns, as the circle of equal area
    max_radius_um: float
    min_contrast: float  # optical density (base 10) of a nucleus above its surround
    strictness: float  # least quality of a nucleus, see _quality; lower finds more nuclei and else
    min_blueness: float  # red over blue density of a nucleus; red cells are near 0.7
    merge_um: float  # centres of the lobes of one nucleus are closer than this

    def __post_init__(self) -> None:
        """Refuse values that no nucleus can meet."""
        for name in ("min_radius_um", "min_contrast", "strictness", "min_blueness", "merge_um"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"detect.hematoxylin.{name} is {value}: it must be above 0")
        if self.min_radius_um < WORK_MPP:
            raise ValueError(
                f"detect.hematoxylin.min_radius_um is {self.min_radius_um}: it must be at least "
                f"{WORK_MPP}, a pixel of what is searched"
            )
        if not self.min_radius_um < self.max_radius_um <= MOST_RADIUS_UM:
            raise ValueError(
                f"detect.hematoxylin.max_radius_um is {self.max_radius_um}: it must be above "
                f"min_radius_um ({self.min_radius_um}) and at most {MOST_RADIUS_UM}"
            )
        if self.merge_um > 2 * self.max_radius_um:
            raise ValueError(
                f"detect.hematoxylin.merge_um is {self.merge_um}: it must be at most twice "
                f"max_radius_um ({self.max_radius_um}), lobes lie within one nucleus"
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
    if not _is_lit(patch):
        none = np.zeros(0, np.float32)
        return Detection(np.zeros((0, 2), np.float32), none, none, [])
    height, width = patch.shape[:2]
    factor = min(1.0, mpp / WORK_MPP)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    scale = np.array([width / size[0], height / size[1]])  # working pixel to patch pixel
    um = mpp * math.sqrt(scale[0] * scale[1])  # microns per working pixel
    density = _density(cv2.resize(patch, size, interpolation=cv2.INTER_AREA), um)
    stain = _stain(density, params.channel)
    spots = _top_hat(stain, 1.1 * params.max_radius_um / um)
    cuts = cut(spots, SHARES, um, params.min_contrast, params.min_radius_um)
    found = join([measure(labels, count, density, um) for labels, count in cuts])
    inner = np.repeat([False, True], [count for _, count in cuts])
    candidate = _has_shape(found, params) & (_is_blue(found, params) | _is_gray(density))
    quality = _quality(found, candidate, max(NOISE, NOISE_SHARE * np.percentile(spots[::2], 99.5)))
    wanted = (quality >= params.strictness) & (~inner | _in_cell(found, IN_DARK_CELL[0]))
    labels, kept = best(cuts, np.where(inner, PREFER, 1.0) * quality * wanted)
    nuclei = unite(found, kept, quality, stain, params.merge_um / um, params.max_radius_um)
    return detection(nuclei, labels, scale)


def _is_lit(patch: UInt8[np.ndarray, "height width 3"]) -> bool:
    """Whether light came through in red or green; else densities are those of noise."""
    return bool(np.percentile(patch[::4, ::4, :2], 98) > LIT)


def _density(image: UInt8[np.ndarray, "height width 3"], um: float) -> Colour:
    """Optical density above glass, base 10, of the slightly blurred image."""
    table = -np.log10(np.maximum(np.arange(256), DARKEST) / 255).astype(np.float32)
    density = cv2.GaussianBlur(cv2.LUT(image, table), (0, 0), max(BLUR_UM / um, 0.3))
    glass = np.percentile(density[::4, ::4].reshape(-1, 3), GLASS, axis=0)
    return density - glass.astype(np.float32)


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
    opened = cv2.morphologyEx(coarse, cv2.MORPH_OPEN, kernel, borderType=cv2.BORDER_REPLICATE)
    return np.maximum(stain - cv2.resize(opened, (width, height)), 0)


def _is_gray(density: Colour) -> bool:
    """Whether the patch has no colour to judge by."""
    few = density[::4, ::4]
    return bool(np.percentile(np.ptp(few, axis=2), 99) < GRAY * np.percentile(few, 99))


def _in_cell(found: Regions, share: float) -> Bool[np.ndarray, " region"]:
    """Whether stain surrounds the region, of this share of its contrast all around."""
    return found.cell > share * found.contrast


def _is_blue(found: Regions, params: Params) -> Bool[np.ndarray, " region"]:
    within = [_in_cell(found, IN_DARK_CELL[0]), _in_cell(found, IN_CELL[0])]
    share = np.select(within, [IN_DARK_CELL[1], IN_CELL[1]], 1.0)
    return found.above_ring[:, 0] >= share * params.min_blueness * found.above_ring[:, 2]


def _has_shape(found: Regions, params: Params) -> Bool[np.ndarray, " region"]:
    return (
        (found.radius_um >= params.min_radius_um)
        & (found.radius_um <= params.max_radius_um)
        & (found.axes[:, 1] >= LEAST_ROUND * found.axes[:, 0])
        & (found.fullness >= LEAST_FULL)
    )


def _quality(
    found: Regions, candidate: Bool[np.ndarray, " region"], noise: float
) -> Float64[np.ndarray, " region"]:
    """How dark, blue, round and full; 1 and more for sharp round nuclei, 0 for no candidate.

    Dark is the mean (geometric) of the contrast over the spread of the region's own surround, and
    over the median contrast of those that stand out clearly. What red and green have beyond blue
    counts more: pale violet nuclei of Giemsa stains are known by their colour. Folds, edges of
    cells and dirt are dark, but neither round nor full, nor do they stand out from their surround.
    """
    shape = found.fullness * np.sqrt(found.axes[:, 1] / found.axes[:, 0])
    spread = np.maximum(found.spread + noise, 1e-6)
    sure = np.where(candidate, shape * found.contrast / spread, 0)
    clear = found.contrast[candidate & (sure >= min(SURE, sure.max(initial=0)))]
    typical = max(np.median(clear), 1e-6) if clear.size else math.inf
    blue = np.clip(found.contrast - found.above_ring[:, 2], 0, found.contrast)
    dark = (found.contrast + BLUE * blue) / np.sqrt(STANDS_OUT * spread * typical)
    return np.where(candidate, shape * dark, 0)
