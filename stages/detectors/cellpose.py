"""Nuclei by Cellpose: a network for any cell, the recommended detector where weights are at hand.

Weights of cellpose 4 (cpsam: a vision transformer of 1.2 GB, wants a GPU; reads colour) and of
cellpose 1 to 3 (CPnet: 26 MB, runs on a CPU; reads inverted gray) are both taken, each by the
cellpose release that knows its network: release 4 no longer ships CPnet.
"""

import functools
import logging
import math
import os
import pickle
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from scipy.special import expit

from stages.common import devices, digests
from stages.detectors import Detection, _identity, _scaling
from stages.detectors._labels import measure
from stages.detectors._patches import check

VERSION = 1  # raise it when the same input gives other nuclei
LIBRARIES = ("cellpose", "opencv-python-headless", "scipy", "torch")
SMALLEST = 0.1  # of the area of a nucleus of diameter_um: smaller ones are dropped
NETWORK_PX = 30  # a nucleus of diameter_um is scaled to this by cellpose
HOME = "https://huggingface.co/mouseland/cellpose-sam"
ANEW = (
    f"compare its sha256 with that on the page of the file, fetch it anew from {HOME}, or set "
    "detect.cellpose.weights"
)


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
        models, release = _cellpose()
        self._params = params
        self._path = _locate(params.weights, models)
        self._keys = _keys(self._path)
        self._reads_colour = "W2" in self._keys
        _check_generation(self._path, self._reads_colour, release)
        self.version = _version(self._path)
        self.device = devices.pick(params.device, "detect.cellpose")

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol."""
        check(patches, mpp)
        if not len(patches):
            return []
        _scaling.check(mpp, self._params.diameter_um / NETWORK_PX)
        diameter_px = self._params.diameter_um / mpp
        masks, flows, _ = self._network.eval(
            patches if self._reads_colour else _inverted_gray(patches),
            batch_size=self._params.batch_tiles,
            normalize={"norm3D": False},  # each patch by itself
            diameter=diameter_px,
            flow_threshold=self._params.flow_threshold,
            cellprob_threshold=self._params.cellprob_threshold,
            min_size=max(1, round(SMALLEST * math.pi / 4 * diameter_px**2)),
            **({"channel_axis": 3} if self._reads_colour else {"channels": [0, 0], "z_axis": 0}),
        )
        score = expit(flows[2].reshape(patches.shape[:3]))
        labels = masks.reshape(patches.shape[:3])
        return [measure(*pair, mpp) for pair in zip(labels, score, strict=True)]

    @functools.cached_property
    def _network(self) -> Any:
        import torch

        models, _ = _cellpose()
        # Sixteen bits are slower than 32 on a CPU.
        precision = {"use_bfloat16": self.device != "cpu"} if self._reads_colour else {}
        model = models.CellposeModel(
            pretrained_model=str(self._path), device=torch.device(self.device), **precision
        )
        missing = sorted(set(model.net.state_dict()) - self._keys)
        if missing:
            raise ValueError(
                f"{_named(self._path)} lacks {missing[0]} and {len(missing) - 1} more of the "
                f"network's weights: {ANEW}"
            )
        return model


def identity(params: Params) -> str:
    """See `stages.detectors`; a model's name alone until cellpose has fetched its weights.

    Raises:
        ImportError: cellpose is not installed.
    """
    _release()
    fetched = next((one for one in _places(params.weights) if one.is_file()), None)
    if fetched is None:
        _check_name(params.weights)
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


def _cellpose() -> tuple[ModuleType, str]:
    try:
        from cellpose import models
    except ImportError as error:
        raise _not_installed(error) from error
    return models, _release()


def _release() -> str:
    try:
        return metadata.version("cellpose")
    except metadata.PackageNotFoundError as error:
        raise _not_installed(error) from error


def _not_installed(error: Exception) -> ImportError:
    return ImportError(
        f"the detector cellpose cannot be imported ({error}): install it by "
        "`pip install 'cytossl[cellpose]'`, or set detect.detector to hematoxylin"
    )


def _places(weights: str) -> tuple[Path, Path]:
    """A file of that name, and where cellpose keeps the model of that name."""
    kept = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose" / "models"
    return Path(weights), Path(kept) / weights


def _check_name(weights: str) -> None:
    """Refuse the path of a file that is not there; what is no path may be a model's name."""
    if "/" in weights or Path(weights).suffix:
        raise FileNotFoundError(
            f"detect.cellpose.weights is {weights}, and there is no such file: mend the path, or "
            f"name a model, as cpsam ({HOME})"
        )


def _version(path: Path) -> str:
    return _identity.of("cellpose", VERSION, LIBRARIES, digests.digest_of([path]))


def _named(path: Path) -> str:
    return f"{path} (sha256 {digests.digest_of([path])})"


def _locate(weights: str, models: ModuleType) -> Path:
    path = Path(weights)
    if path.is_file():
        return path
    if weights not in models.MODEL_NAMES:
        raise FileNotFoundError(
            f"detect.cellpose.weights is {weights}: it must be a file or one of "
            f"{', '.join(models.MODEL_NAMES)}; get the file cpsam from {HOME}"
        )
    try:
        fetch = getattr(models, "model_path", models.cache_model_path)  # the former: cellpose 3
        return Path(fetch(weights))
    except OSError as error:
        raise FileNotFoundError(
            f"the weights {weights} cannot be fetched ({error}): get the file from {HOME} where "
            "there is a network, and put its path into detect.cellpose.weights"
        ) from error


def _keys(path: Path) -> set[str]:
    """Names of the weights in a file; nothing but tensors is ever unpickled."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, KeyError) as error:
        why = type(error).__name__  # torch's own words advise to run what is in the file
        raise ValueError(f"{_named(path)} holds no weights ({why}): {ANEW}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{_named(path)} holds no weights by name but a {type(state).__name__}: {ANEW}"
        )
    return {name.removeprefix("module.") for name in state}


def _check_generation(path: Path, reads_colour: bool, release: str) -> None:
    major = int(release.split(".")[0])
    if reads_colour and major < 4:
        raise ImportError(
            f"{path} holds weights of cellpose 4, and {release} is installed: install "
            "'cellpose>=4', or set detect.cellpose.weights to weights of cellpose 1 to 3"
        )
    if not reads_colour and major > 3:
        raise ImportError(
            f"{path} holds no weights of cellpose 4, and {release} has no network for those of "
            "cellpose 1 to 3: install 'cellpose<4', or set detect.cellpose.weights to cpsam"
        )


def _inverted_gray(
    patches: UInt8[np.ndarray, "patch height width 3"],
) -> UInt8[np.ndarray, "patch height width"]:
    """Bright nuclei on dark, which the networks before cellpose 4 were trained on."""
    return 255 - np.stack([cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY) for patch in patches])
