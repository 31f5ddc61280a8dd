"""Nuclei by InstanSeg: a small network for brightfield nuclei, from its TorchScript file alone.

Goldsborough et al. 2024, arXiv 2408.15954; the published model brightfield_nuclei 0.1.1 reads RGB
at 0.5 microns per pixel. Patches are scaled to that, and what is found is scaled back. The file
holds the network and the steps that follow it, so that the package instanseg is not needed.

TorchScript is code: the file must be one that you trust. The published one is known by its sha256;
any other is refused unless `detect.instanseg.sha256` names it.
"""

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from stages.common import devices
from stages.detectors import Detection, _identity, _scaling
from stages.detectors._labels import measure
from stages.detectors._patches import check

VERSION = 1  # raise it when the same input gives other nuclei
LIBRARIES = ("opencv-python-headless", "scipy", "torch")
PUBLISHED = "0c724da169d507d8dd2e206ad3675a0b1566824eee6e20ad9a0ba916311d9dd0"
HOME = "https://github.com/instanseg/instanseg (model brightfield_nuclei 0.1.1, file instanseg.pt)"
LOW, HIGH = 0.1, 99.9  # percentiles of each channel of a patch that become 0 and 1
LEAST_RANGE = 1e-6
LEAST_PX = 64  # the script looks at windows of so many pixels around a seed


@dataclass(frozen=True)
class Params:
    """The section `detect.instanseg`."""

    weights: str  # the file instanseg.pt
    sha256: str  # of weights of your own, 64 hex digits; empty: the published ones and no other
    seed_threshold: float  # of the network's seed map, 0 to 1; lower finds more, also of else
    min_radius_um: float  # smaller ones are dropped, microns
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is a device

    def __post_init__(self) -> None:
        """Refuse values that find nothing."""
        if not re.fullmatch("([0-9a-fA-F]{64})?", self.sha256):
            raise ValueError(
                f"detect.instanseg.sha256 is {self.sha256!r}: it must be 64 hex digits, or empty "
                "for the published weights"
            )
        if not 0 < self.seed_threshold < 1:
            raise ValueError(
                f"detect.instanseg.seed_threshold is {self.seed_threshold}: it must be above 0 and "
                "below 1"
            )
        if not 0 <= self.min_radius_um < math.inf:
            raise ValueError(
                f"detect.instanseg.min_radius_um is {self.min_radius_um}: it must be 0 or more"
            )


class _InstanSeg:
    """See `stages.detectors.Detector`. The network is read at the first call, in the worker."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._path = Path(params.weights)
        self._digest = _digest(params)
        _check_digest(self._path, self._digest, params.sha256)
        self.version = identity(params)
        self.device = devices.pick(params.device, "detect.instanseg")
        if params.sha256:  # the published ones are known to be right
            self._read("cpu")

    def __call__(
        self, patches: UInt8[np.ndarray, "patch height width 3"], mpp: float
    ) -> list[Detection]:
        """The nuclei of each patch; see the Protocol. The script gives no score: all are 1.0."""
        check(patches, mpp)
        if not len(patches):
            return []
        scaled = [
            _scaling.to(patch, mpp, self._network.pixel_size, cv2.INTER_LINEAR) for patch in patches
        ]
        (height, width), zoom = scaled[0][0].shape[:2], scaled[0][1]  # patches are of one size
        labels = self._segment(np.stack([_normalised(image) for image, _ in scaled]))
        return [self._measure(one[:height, :width], mpp, zoom) for one in labels]

    def _segment(
        self, images: Float32[np.ndarray, "patch 3 height width"]
    ) -> Int64[np.ndarray, "patch height width"]:
        import torch

        # A batch makes a GPU faster and a CPU slower. Unoptimised execution, since the optimiser
        # of TorchScript changes the rounding from the third call on.
        at_once = 1 if self.device == "cpu" else len(images)
        with _quiet(), torch.inference_mode(), torch.jit.optimized_execution(False):
            parts = [
                self._network(part.to(self.device), seed_threshold=self._params.seed_threshold)
                for part in torch.from_numpy(images).split(at_once)
            ]
        return torch.cat(parts)[:, 0].round().long().cpu().numpy()

    def _measure(
        self, labels: Int64[np.ndarray, "height width"], mpp: float, zoom: tuple[float, float]
    ) -> Detection:
        um2 = mpp**2 * zoom[0] * zoom[1]
        large = np.bincount(labels.ravel()) * um2 >= math.pi * self._params.min_radius_um**2
        kept = np.where(large[labels], labels, 0)
        count = len(np.unique(kept[kept > 0]))
        return measure(kept, np.ones(count, np.float32), mpp, zoom)

    @functools.cached_property
    def _network(self) -> Any:
        return self._read(self.device)

    def _read(self, device: str) -> Any:
        import torch

        try:
            with _quiet():
                network = torch.jit.load(self._path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise _unfit(self._path, self._digest, f"is no TorchScript file ({why})") from None
        if not hasattr(network, "pixel_size") or getattr(network, "cells_and_nuclei", True):
            raise _unfit(self._path, self._digest, "is no InstanSeg model of nuclei alone")
        return network


def identity(params: Params) -> str:
    """See `stages.detectors`."""
    return _identity.of("instanseg", VERSION, LIBRARIES, _digest(params))


def build(params: Params) -> _InstanSeg:
    """The detector with these settings; its weights are checked here, your own are read too.

    Raises:
        FileNotFoundError: there are no weights at the path.
        ValueError: the weights are not those that are trusted or no InstanSeg model of nuclei, or
            there is no such device.
    """
    return _InstanSeg(params)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch says of TorchScript's future and of the script's sparse tensors helps no user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _digest(params: Params) -> str:
    wanted = params.sha256.lower() or PUBLISHED
    where = f"get it from {HOME}; its sha256 is {wanted}"
    return _identity.digest_of(Path(params.weights), "detect.instanseg.weights", where)


def _check_digest(path: Path, digest: str, own: str) -> None:
    wanted = own.lower() or PUBLISHED
    if digest != wanted:
        raise _unfit(
            path,
            digest,
            f"must have sha256 {wanted}: it is damaged or another file, and TorchScript is code",
        )


def _unfit(path: Path, digest: str, why: str) -> ValueError:
    return ValueError(
        f"{path} (sha256 {digest}) {why}; get the weights anew from {HOME}, or name others, if you "
        "trust them, by detect.instanseg.weights and sha256"
    )


def _normalised(image: UInt8[np.ndarray, "height width 3"]) -> Float32[np.ndarray, "3 _ _"]:
    """A patch at the network's scale of values, filled up to LEAST_PX."""
    image = image.astype(np.float32)
    low, high = np.percentile(image, [LOW, HIGH], axis=(0, 1))
    image = ((image - low) / np.maximum(high - low, LEAST_RANGE)).astype(np.float32)
    below, right = (max(0, LEAST_PX - side) for side in image.shape[:2])
    padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(padded.transpose(2, 0, 1))
