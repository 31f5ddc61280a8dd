"""Released weights of CellViT made into a function from an image to its maps."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from stages.detectors import _cellvit_encoders, _cellvit_network

PARTS = {"arch": str, "config": dict, "model_state_dict": dict}
ARCHITECTURES = ("CellViT256", "CellViTSAM")
GRAY = (0.5, 0.5, 0.5)  # mean and deviation when the file names none, as in the authors' code


@dataclass(frozen=True)
class Model:
    """The network, and how it wants its input."""

    network: _cellvit_network.CellViT
    mean: Float[Tensor, "3 1 1"]
    deviation: Float[Tensor, "3 1 1"]
    half: bool  # sixteen bits, on a GPU

    @torch.inference_mode()
    def __call__(
        self, image: UInt8[np.ndarray, "side side 3"]
    ) -> Float32[np.ndarray, "3 side side"]:
        """Probability of a nucleus, offset to the right and downwards, of each pixel."""
        device = self.mean.device
        pixels = torch.from_numpy(image).to(device).movedim(2, 0) / 255
        with torch.autocast(device.type, torch.float16, enabled=self.half):
            mask, maps = self.network(((pixels - self.mean) / self.deviation)[None])
        nucleus = mask.float().softmax(dim=1)[:, 1:]
        return torch.cat([nucleus, maps.float()], dim=1)[0].cpu().numpy()


def read(path: Path, device: str) -> Model:
    """Read a released file.

    Raises:
        ValueError: it is damaged, or not one of the networks known here; says what it is, without
            the path.
    """
    checkpoint = _load(path)
    config = _flat(checkpoint["config"])
    network = _network(_sizes(checkpoint["arch"], config), checkpoint["model_state_dict"])
    mean, deviation = (
        torch.tensor(config.get(f"transformations.normalize.{name}", GRAY), device=device)
        for name in ("mean", "std")
    )
    half = bool(config.get("training.mixed_precision", False)) and device != "cpu"
    return Model(network.to(device).eval(), mean.reshape(3, 1, 1), deviation.reshape(3, 1, 1), half)


def _load(path: Path) -> dict[str, Any]:
    # Training notes beside the weights may be NumPy's numbers, under the name they had before 2.
    rebuild = np.float64(0).__reduce__()[0]
    harmless = [
        (rebuild, "numpy.core.multiarray.scalar"),
        (rebuild, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.bool_)),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        TypeError,
        KeyError,
        ValueError,
    ) as error:
        why = type(error).__name__  # torch's own words advise to run what is in the file
        raise ValueError(f"is damaged or holds more than weights ({why})") from None
    held = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(held.get(name), kind) for name, kind in PARTS.items()):
        raise ValueError(f"is no checkpoint of CellViT, which has {', '.join(PARTS)}")
    return checkpoint


def _flat(config: dict[str, Any], place: str = "") -> dict[str, Any]:
    """`a.b.c` as keys, whether the file nests them or not."""
    found = {}
    for name, value in config.items():
        found |= (
            _flat(value, f"{place}{name}.") if isinstance(value, dict) else {place + name: value}
        )
    return found


def _sizes(architecture: str, config: dict[str, Any]) -> _cellvit_encoders.Sizes:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"holds a {architecture}, and known are {' and '.join(ARCHITECTURES)}")
    if architecture == "CellViT256":
        return _cellvit_encoders.RELEASED["ViT256"]
    backbone = str(config.get("model.backbone")).upper()
    known = sorted(_cellvit_encoders.RELEASED.keys() - {"ViT256"})
    if backbone not in known:
        raise ValueError(f"has the backbone {backbone}, and known are {', '.join(known)}")
    return _cellvit_encoders.RELEASED[backbone]


def _network(sizes: _cellvit_encoders.Sizes, state: dict[str, Tensor]) -> _cellvit_network.CellViT:
    with torch.device("meta"):  # no memory: the file's tensors are put in their places
        network = _cellvit_network.CellViT(sizes)
    wanted = network.state_dict()
    misfits = [
        name
        for name, like in wanted.items()
        if name not in state or state[name].shape != like.shape
    ]
    if misfits:
        raise ValueError(
            f"lacks {misfits[0]} of shape {list(wanted[misfits[0]].shape)}, and {len(misfits) - 1} "
            "more weights"
        )
    network.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return network
