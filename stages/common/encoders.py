"""Encoders: timm's vision transformers with our attention, built, saved and loaded.

The only timm import. A saved encoder is a folder of two files:

    encoder.safetensors    weights under timm's names; iRPE tables as blocks.<n>.attn.table_*
    encoder.json           spec (what `load` builds), provenance (what made it), weights (SHA-256)
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from safetensors.torch import save as dump
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from cytossl_core.attention import with_sr_attention
from stages.common import params, run

WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"
MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is and what it expects to see."""

    architecture: str  # timm's name of a vision transformer, e.g. vit_tiny_patch16_224
    image_px: int  # side of the image that an embedding is made from, pixels
    token_px: int  # side of a token, pixels of that image
    sparse_topk: int  # keys that a query attends to; 0: all
    irpe: str  # relative position terms of the attention: none, k, qk or qkv
    mean: tuple[float, float, float]  # of red, green, blue in 0 to 1; taken off the image
    std: tuple[float, float, float]  # divides what is left
    patch_px: int  # side of the patches it was trained on, pixels
    mpp: float  # of those patches, microns per pixel


def build(spec: EncoderSpec, drop_path: float = 0.0) -> nn.Module:
    """An untrained encoder: images [batch, 3, px, px] to class tokens [batch, num_features].

    Any px that is a multiple of `token_px` runs through it; absolute positions are resampled.

    Args:
        spec: What to build.
        drop_path: Chance that a sample skips a residual branch in training, rising to this value
            at the last block.

    Raises:
        ValueError: timm knows no such vision transformer, or `image_px` is no multiple of
            `token_px`.
    """
    _check_architecture(spec.architecture)
    if spec.token_px < 1 or spec.image_px % spec.token_px:
        raise ValueError(
            f"an image of {spec.image_px} px is no whole number of tokens of {spec.token_px} px: "
            "choose a multiple"
        )
    model = timm.create_model(
        spec.architecture,
        img_size=spec.image_px,
        patch_size=spec.token_px,
        dynamic_img_size=True,
        drop_path_rate=drop_path,
        num_classes=0,
        global_pool="token",
    )
    return with_sr_attention(model, topk=spec.sparse_topk or None, irpe=spec.irpe)


def _check_architecture(name: str) -> None:
    known = timm.list_models(module="vision_transformer")
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or ["vit_tiny_patch16_224"]
        raise ValueError(
            f"{name!r} is no vision transformer of timm: SR-attention needs one, for example "
            f"{', '.join(near)}"
        )


def prepare(
    patches: UInt8[Tensor, "batch height width 3"], spec: EncoderSpec
) -> Float[Tensor, "batch 3 px px"]:
    """Patches as the encoder expects them: resized with antialiasing, then normalised."""
    images = patches.permute(0, 3, 1, 2).float() / 255
    if images.shape[2:] != (spec.image_px, spec.image_px):
        side = (spec.image_px, spec.image_px)
        images = F.interpolate(images, side, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def save(folder: Path, model: nn.Module, spec: EncoderSpec, provenance: dict[str, Any]) -> None:
    """Write the encoder's two files; equal weights and provenance give equal bytes."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    with run.atomic(folder / WEIGHTS) as temporary:
        temporary.write_bytes(dump(weights, metadata={"format": "pt"}))
        digest = _sha256(temporary)
    described = {"spec": dataclasses.asdict(spec), "provenance": provenance, "weights": digest}
    with run.atomic(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[nn.Module, EncoderSpec]:
    """Build the encoder described in `folder` and give it the weights that lie there.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the description is incomplete, or the weights are not those it describes.
    """
    spec, digest = _describe(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights}: run `dvc repro pretrain`")
    if _sha256(weights) != digest:
        raise ValueError(
            f"{weights} is not the file that {DESCRIPTION} beside it describes: restore both from "
            "one run"
        )
    model = build(spec)
    loaded = load_file(weights)
    _check_weights(loaded, model.state_dict(), weights)
    model.load_state_dict(loaded)
    return model.eval(), spec


def digest_of(folder: Path) -> str:
    """Digest of all that decides an embedding: weights and spec, and not what made them."""
    spec, weights = _describe(folder)
    text = json.dumps([dataclasses.asdict(spec), weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(folder: Path) -> tuple[EncoderSpec, str]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `dvc repro pretrain`")
    described = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in ("spec", "weights") if key not in described]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: it must hold spec, provenance and weights")
    return params.load(EncoderSpec, "spec", path), described["weights"]


def _check_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    absent, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if absent or unknown:
        raise ValueError(
            f"{path} does not fit its spec: {_some(absent)} missing, {_some(unknown)} unknown; "
            "sparse_topk, irpe and architecture must be those it was trained with"
        )
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} is {list(found[name].shape)}: the spec needs {list(value.shape)}"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}, ...)" if names else "none"


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
