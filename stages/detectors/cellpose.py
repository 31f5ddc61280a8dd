"""Nuclei by Cellpose: a network for any cell, the recommended detector where weights are at hand.

Weights of cellpose 4 (cpsam: a vision transformer of 1.2 GB, wants a GPU; reads colour) and of
cellpose 1 to 3 (CPnet: 26 MB, runs on a CPU; reads inverted gray) are both taken, each by the
cellpose release that knows its network: release 4 no longer ships CPnet.
"""

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from scipy.special import expit

from stages.common import devices, digests
from stages.common.memory import is_out_of_memory
from stages.detectors import Detection, _cellpose_weights, _identity, _scaling
from stages.detectors._labels import measure
from stages.detectors._patches import check

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same input gives other nuclei
LIBRARIES = ("cellpose", "opencv-python-headless", "scipy", "torch")
SMALLEST = 0.1  # of the area of a nucleus of diameter_um: smaller ones are dropped
NETWORK_PX = 30  # a nucleus of diameter_um is scaled to this by cellpose


@dataclass(frozen=True)
class Params:
    """The section `detect.cellpose`."""

    weights: str  # name of a cellpose 4 model (cpsam), fetched once by cellpose itself; or a file
    diameter_um: float  # of a typical nucleus, microns
    flow_threshold: float  # masks whose flows err by more are dropped, no unit; 0 keeps all
    cellprob_threshold: float  # logit above which a pixel is nucleus
    batch_tiles: int  # network tiles of 224 or 256 px that are run at once
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is a device

    def __post_init__(self) -> None:
        """Refuse values that find nothing."""
        if not 0 < self.diameter_um < math.inf:
            raise ValueError(
                f"detect.cellpose.diameter_um is {self.diameter_um}: it must be above 0"
            )
        if not 0 <= self.flow_threshold < math.inf:
            raise ValueError(
                f"detect.cellpose.flow_threshold is {self.flow_threshold}: it must be 0 or more"
            )
        if not math.isfinite(self.cellprob_threshold):
            raise ValueError(
                f"detect.cellpose.cellprob_threshold is {self.cellprob_threshold}: it must be "
                "finite, near 0"
            )
        if self.batch_tiles < 1:
            raise ValueError(
                f"detect.cellpose.batch_tiles is {self.batch_tiles}: it must be 1 or more"
            )


class _Cellpose:
    """See `stages.detectors.Detector`. The network is built at the first call, in the worker."""

    def __init__(self, params: Params) -> None:
        logging.getLogger("cellpose").setLevel(logging.ERROR)  # it reports every patch
        models, release = _cellpose_weights.library()
        self._params = params
        self._path = _cellpose_weights.locate(params.weights, models)
        self._keys = _cellpose_weights.keys(self._path)
        self._reads_colour = "W2" in self._keys
        _cellpose_weights.check_generation(self._path, self._reads_colour, release)
        self.version = _version(self._path)
        self.device = devices.pick(params.device, "detect.cellpose")
        self._tiles = params.batch_tiles  # at once, as many as fit the memory

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol."""
        check(patches, mpp)
        if not len(patches):
            return []
        _scaling.check(mpp, self._params.diameter_um / NETWORK_PX)
        labels, score = self._within_memory(patches, self._params.diameter_um / mpp)
        return [measure(*pair, mpp) for pair in zip(labels, score, strict=True)]

    def _within_memory(self, patches: np.ndarray, diameter_px: float) -> tuple[np.ndarray, ...]:
        """Run fewer tiles at once where memory runs out: they take it, whatever the patches."""
        asked = self._tiles
        while (found := self._attempt(patches, diameter_px)) is None:
            self._tiles //= 2
        if self._tiles < asked:
            logger.warning(
                "detect: %d tiles of Cellpose's network at once do not fit the memory of %s: going "
                "on with %d; set detect.cellpose.batch_tiles to that",
                *(asked, self.device, self._tiles),
            )
        return found

    def _attempt(self, patches: np.ndarray, diameter_px: float) -> tuple[np.ndarray, ...] | None:
        """None when memory ran out and fewer tiles may do."""
        try:
            return self._segment(patches, diameter_px)
        except (RuntimeError, MemoryError) as error:
            if self._tiles == 1 or not is_out_of_memory(error):
                raise
        return None

    def _segment(self, patches: np.ndarray, diameter_px: float) -> tuple[np.ndarray, ...]:
        """Label images and each pixel's score."""
        masks, flows, _ = self._network.eval(
            patches if self._reads_colour else _inverted_gray(patches),
            batch_size=self._tiles,
            normalize={"norm3D": False},  # each patch by itself
            diameter=diameter_px,
            flow_threshold=self._params.flow_threshold,
            cellprob_threshold=self._params.cellprob_threshold,
            min_size=max(1, round(SMALLEST * math.pi / 4 * diameter_px**2)),
            **({"channel_axis": 3} if self._reads_colour else {"channels": [0, 0], "z_axis": 0}),
        )
        return masks.reshape(patches.shape[:3]), expit(flows[2].reshape(patches.shape[:3]))

    @functools.cached_property
    def _network(self) -> Any:
        import torch

        models, _ = _cellpose_weights.library()
        # Sixteen bits are slower than 32 on a CPU.
        precision = {"use_bfloat16": self.device != "cpu"} if self._reads_colour else {}
        model = models.CellposeModel(
            pretrained_model=str(self._path), device=torch.device(self.device), **precision
        )
        missing = sorted(set(model.net.state_dict()) - self._keys)
        if missing:
            raise ValueError(
                f"{_cellpose_weights.named(self._path)} lacks {missing[0]} and "
                f"{len(missing) - 1} more of the network's weights: {_cellpose_weights.ANEW}"
            )
        return model


def identity(params: Params) -> str:
    """See `stages.detectors`; a model's name alone until cellpose has fetched its weights.

    Raises:
        ImportError: cellpose is not installed.
    """
    _cellpose_weights.release()
    fetched = next((one for one in _cellpose_weights.places(params.weights) if one.is_file()), None)
    if fetched is None:
        _cellpose_weights.check_name(params.weights)
        return f"{_identity.of('cellpose', VERSION, LIBRARIES)}, {params.weights} not fetched"
    return _version(fetched)


def build(params: Params) -> _Cellpose:
    """The detector with these settings; its weights are found and read here, or an error says why.

    Raises:
        ImportError: cellpose is not installed, or this release has no network for the weights.
        FileNotFoundError: the weights are neither a file nor to be fetched.
        ValueError: the weights' file is damaged or holds something else.
    """
    return _Cellpose(params)


def _version(path: Path) -> str:
    return _identity.of("cellpose", VERSION, LIBRARIES, digests.digest_of([path]))


def _inverted_gray(
    patches: UInt8[np.ndarray, "patch height width 3"],
) -> UInt8[np.ndarray, "patch height width"]:
    """Bright nuclei on dark, which the networks before cellpose 4 were trained on."""
    return 255 - np.stack([cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY) for patch in patches])
