"""ONNX: an encoder for programs without torch.

Exported is the dense-equivalent forward: all scores of the attention are computed, with the terms
of relative positions, and those below the h-th largest of their row are set to -inf, ties kept. The
numbers are those of the sparse paths up to rounding; only their saving of work is not exported.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stages.common import encoders
from stages.common.spec import EncoderSpec

MOST_INSIDE = 1 << 30  # bytes of weights in the file itself; protobuf holds 2 GiB
TOLERANCE = 1e-4  # largest difference allowed, of embeddings up to 1; beyond, of their largest
BATCHES = (1, 3)  # that the file is tried with


def to_onnx(folder: Path, target: Path) -> float:
    """Write the encoder in `folder` as an ONNX file and try it against torch.

    Its input `images` is [batch, 3, image_px, image_px], any batch, resized and normalised as
    `encoders.prepare` does it; its output `embedding` is [batch, dim]. The spec lies in the file's
    metadata. Weights of more than 1 GiB lie beside it in <target>.data.

    Returns:
        The largest difference found, relative to the largest number or 1.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is not installed.
        ValueError: the exported file does not compute what torch does.
    """
    _check_installed()
    model, spec = encoders.load(folder)
    for module in model.modules():
        if hasattr(module, "backend") and hasattr(module, "topk"):
            module.backend = "torch"
    images = torch.randn(2, 3, spec.image_px, spec.image_px, generator=_chance())
    program = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["embedding"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props["spec"] = json.dumps(dataclasses.asdict(spec))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        written = Path(temporary) / target.name
        program.save(written, external_data=_bytes(model) > MOST_INSIDE)
        difference = _tried(written, model, spec)
        for file in sorted(Path(temporary).iterdir(), reverse=True):
            os.replace(file, target.with_name(file.name))
    return difference


def _tried(path: Path, model: nn.Module, spec: EncoderSpec) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst, chance = 0.0, _chance()
    for batch in BATCHES:
        images = torch.randn(batch, 3, spec.image_px, spec.image_px, generator=chance)
        (got,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, _difference(got, _embed(model, images)))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"the exported encoder differs from torch's by {worst:.2e}: it must be by no more than "
            f"{TOLERANCE}; try other versions of torch and onnxruntime"
        )
    return worst


@torch.inference_mode()
def _embed(model: nn.Module, images: Tensor) -> np.ndarray:
    return model(images).numpy()


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1.0))


def _chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def _check_installed() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(name)  # here: only an export needs them
        except ImportError:
            raise ImportError(
                f"an export needs {name}, which is not installed: pip install '.[onnx]'"
            ) from None
