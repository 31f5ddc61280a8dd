"""Nuclei by CellViT, the detector of the Cyto-SSL paper, from its released weights alone.

Hörst et al. 2024, Medical Image Analysis 94, arXiv 2306.15350. The package `cellvit` asks for NumPy
below 2 and cannot be installed beside ours: network and post-processing are written anew here, for
CellViT-256 and CellViT-SAM-B, -L and -H. Shown against cellvit 1.0.9 (tests/stages/test_cellvit.py,
where it is installed): the weights' names and shapes, equal outputs for equal random weights
(CellViT-256 and -SAM-B), the same label in every pixel for equal maps. Not shown, for want of the
released files: that they load, and how well they find nuclei.

Licence: the weights of CellViT-256 are Apache-2.0 with a Commons Clause (not to be sold or used
commercially without leave); read the LICENSE beside the file that you use.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from stages.common import devices
from stages.detectors import Detection, _identity, _scaling, _spans
from stages.detectors._cellvit_cells import separate
from stages.detectors._labels import measure
from stages.detectors._patches import check

if TYPE_CHECKING:
    from stages.detectors._cellvit_weights import Model

VERSION = 2  # raise it when the same input gives other nuclei
LIBRARIES = ("opencv-python-headless", "scikit-image", "scipy", "torch")
SCALES = (0.25, 0.5)  # microns per pixel of the released weights, x40 and x20
HOME = "https://zenodo.org/records/15094831 (CellViT-256-x40-AMP.pth or CellViT-SAM-H-x40-AMP.pth)"
LICENCE = "CellViT-256 is Apache-2.0 with a Commons Clause, not for sale: read its LICENSE"
LEAST_PX, MOST_PX = 256, 1024  # sides of what the network is given: of training and of inference
OVERLAP_PX = 128  # of windows, where a patch is larger than MOST_PX


@dataclass(frozen=True)
class Params:
    """The section `detect.cellvit`."""

    weights: str  # a released file; CellViT-256 or CellViT-SAM
    mpp: float  # of the weights, microns per pixel: 0.25 for x40, 0.5 for x20
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is a device

    def __post_init__(self) -> None:
        """Refuse a scale that no weights have."""
        if self.mpp not in SCALES:
            raise ValueError(
                f"detect.cellvit.mpp is {self.mpp}: it must be 0.25 for weights called x40, or 0.5 "
                "for x20"
            )


class _CellViT:
    """See `stages.detectors.Detector`. The network is kept from the first call on, in the worker.

    Patches pass it one by one: what is found in one cannot depend on the others, not even by
    rounding, and 1,000 tokens and more keep a device busy.
    """

    def __init__(self, params: Params) -> None:
        self._params = params
        self._path = Path(params.weights)
        self._digest = _digest(params)
        self.version = identity(params)
        self.device = devices.pick(params.device, "detect.cellvit")
        self._read("cpu")  # to find damage before the workers start

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol."""
        check(patches, mpp)
        return [self._detect(patch, mpp) for patch in patches]

    def _detect(self, patch: UInt8[np.ndarray, "height width 3"], mpp: float) -> Detection:
        image, zoom = _scaling.to(patch, mpp, self._params.mpp, cv2.INTER_CUBIC)
        probability, horizontal, vertical = self._maps(image)
        labels = separate(probability > 0.5, horizontal, vertical, self._params.mpp)
        return measure(labels, probability, mpp, zoom)

    def _maps(
        self, image: UInt8[np.ndarray, "height width 3"]
    ) -> Float32[np.ndarray, "3 height width"]:
        """Probability and the two offsets; of a large image from overlapping windows."""
        maps = np.empty((3, *image.shape[:2]), np.float32)
        for top, bottom, row in _windows(image.shape[0]):
            for left, right, column in _windows(image.shape[1]):
                window = image[top:bottom, left:right]
                found = self._model(_padded(window))[:, : len(window), : window.shape[1]]
                # What lies right of and below a window's own part is overwritten by the next one.
                maps[:, row:bottom, column:right] = found[:, row - top :, column - left :]
        return maps

    @functools.cached_property
    def _model(self) -> "Model":
        return self._read(self.device)

    def _read(self, device: str) -> "Model":
        from stages.detectors import _cellvit_weights

        try:
            return _cellvit_weights.read(self._path, device)
        except ValueError as error:
            raise ValueError(
                f"{self._path} (sha256 {self._digest}) {error}: compare its sum with that on the "
                f"page, fetch CellViT's weights anew from {HOME}, or set detect.cellvit.weights"
            ) from None


def identity(params: Params) -> str:
    """See `stages.detectors`."""
    return _identity.of("cellvit", VERSION, LIBRARIES, _digest(params))


def build(params: Params) -> _CellViT:
    """The detector with these settings; its weights are read here, or an error says why not.

    Raises:
        FileNotFoundError: there are no weights at the path.
        ValueError: the file is damaged or holds another network, or there is no such device.
    """
    return _CellViT(params)


def _digest(params: Params) -> str:
    where = f"get it from {HOME}; {LICENCE}"
    return _identity.digest_of(Path(params.weights), "detect.cellvit.weights", where)


def _windows(length: int) -> list[tuple[int, int, int]]:
    """(start, end, where its part begins) of each window along one axis."""
    starts, side, parts = _spans.of(length, MOST_PX, OVERLAP_PX)
    pairs = zip(starts.tolist(), parts[:, 0].astype(int).tolist(), strict=True)
    return [(start, start + side, own) for start, own in pairs]


def _padded(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "side side 3"]:
    """Mirrored to the right and below until it is square and a multiple of 16."""
    side = max(LEAST_PX, 16 * math.ceil(max(image.shape[:2]) / 16))
    below, right = side - image.shape[0], side - image.shape[1]
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT)
