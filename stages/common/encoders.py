"""Encoders: built, saved and loaded.

A saved encoder is a folder of these files, and MODEL_CARD.md (card.py) for people:

    encoder.safetensors    weights under timm's names; iRPE tables as blocks.<n>.attn.table_*; of an
                           encoder with adapters only those and the tables
    encoder.json           spec (what `load` builds), timm and sr_attention (the same as arguments
                           of timm.create_model and with_sr_attention), base (where training began),
                           provenance (what made it), licence, weights (SHA-256)

Both may come from strangers: nothing in them is run, and nothing is built that they do not fill.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save as dump
from torch import Tensor, nn

from stages.common import architectures, lora, params, run, version, weights
from stages.common.architectures import MEAN, STD, build
from stages.common.spec import RANDOM, Base, EncoderSpec

__all__ = ["MEAN", "STD", "EncoderSpec", "build", "digest_of", "load", "prepare", "save"]

WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"
MOST_BYTES = 2**20  # of a description


def prepare(
    patches: UInt8[Tensor, "batch height width 3"], spec: EncoderSpec
) -> Float[Tensor, "batch 3 px px"]:
    """Patches as the encoder expects them: resized with antialiasing, then normalised."""
    images = patches.permute(0, 3, 1, 2).contiguous().float()
    if images.shape[2:] != (spec.image_px, spec.image_px):
        side = (spec.image_px, spec.image_px)
        images = F.interpolate(images, side, mode="bicubic", antialias=True).clamp_(0, 255)
    mean, std = (255 * images.new_tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return images.sub_(mean).div_(std)


def save(folder: Path, model: nn.Module, spec: EncoderSpec, provenance: dict[str, Any]) -> None:
    """Write the encoder's two files; equal weights, provenance and code give equal bytes.

    `model.base`, as `backbones.prepare` and `load` set it, says where training began; a model
    without it began with random numbers.
    """
    own = lora.adapters(model) if spec.lora else model.state_dict()
    kept = {name: value.detach().cpu().contiguous() for name, value in own.items()}
    with run.atomic(folder / WEIGHTS) as temporary:
        temporary.write_bytes(dump(kept, metadata={"format": "pt"}))
        digest = _sha256(temporary)
    base = getattr(model, "base", RANDOM)
    described = {
        "spec": dataclasses.asdict(spec),
        "timm": architectures.arguments(spec),
        "sr_attention": architectures.attention(spec),
        "base": dataclasses.asdict(base),
        "provenance": {**provenance, "version": version.of_code()},
        "licence": _licence(base),
        "weights": digest,
    }
    with run.atomic(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _licence(base: Base) -> dict[str, str]:
    return {
        "code": "Apache-2.0",
        "base_weights": base.licence or "there are none: training began with random numbers",
        "weights": "not chosen yet: whoever publishes them states it, within the base weights'",
    }


def load(folder: Path) -> tuple[nn.Module, EncoderSpec]:
    """Build the encoder described in `folder` and give it the weights that lie there.

    Adapters are merged into the base weights, so that every encoder is a plain one.

    Raises:
        OSError: a file is missing, or base weights are and cannot be fetched.
        ValueError: the description is incomplete, or the weights are not those it describes.
    """
    spec, base, found = read(folder)
    if spec.lora:
        model = lora.merge(with_adapters(spec, base, found, folder))
    else:
        model = build(spec, empty=True)
        weights.check(found, model.state_dict(), f"the weights in {folder / WEIGHTS}")
        model.load_state_dict(found, assign=True)
    model.base = base
    return model.eval(), spec


def read(folder: Path) -> tuple[EncoderSpec, Base, dict[str, Tensor]]:
    """What lies in an encoder's folder: spec, where training began, weights or adapters."""
    described = describe(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `dvc repro pretrain`")
    if _sha256(path) != described["weights"]:
        raise ValueError(
            f"{path} is not the file that {DESCRIPTION} beside it describes: restore both from "
            "one run"
        )
    return described["spec"], described["base"], weights.tensors(path)


def with_adapters(
    spec: EncoderSpec,
    base: Base,
    found: dict[str, Tensor],
    folder: Path,
    drop_path: float = 0.0,
) -> nn.Module:
    """The base weights and, beside them, the adapters `found` in `folder`."""
    model = build(spec, drop_path, empty=True)
    try:
        given = weights.read(base.weights, spec.architecture)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds adapters, and their base weights are not at {base.weights}: put them "
            f"there, or name their place as base.weights in {folder / DESCRIPTION}"
        ) from None
    weights.fit(model, given, base.weights)
    if weights.digest(model) != base.digest:
        raise ValueError(
            f"the weights from {base.weights} are not those that the adapters in {folder} were "
            f"trained beside: name the place of those as base.weights in {folder / DESCRIPTION}"
        )
    lora.add(model, spec.lora)
    lora.give(model, found, f"the adapters in {folder}")
    return model


def digest_of(folder: Path) -> str:
    """Digest of all that decides an embedding: weights and spec, and not what made them."""
    described = describe(folder)
    decisive = [dataclasses.asdict(described["spec"]), described["weights"]]
    text = json.dumps([*decisive, described["base"].digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(folder: Path) -> dict[str, Any]:
    """encoder.json, with `spec` and `base` as what they are.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no description, or an incomplete one.
    """
    path = folder / DESCRIPTION
    described = _json(path)
    missing = [key for key in ("spec", "weights") if key not in described]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: it must hold spec, provenance and weights")
    spec = params.load(EncoderSpec, "spec", path)
    base = params.load(Base, "base", path) if "base" in described else RANDOM
    if described.get("timm", architectures.arguments(spec)) != architectures.arguments(spec):
        raise ValueError(f"{path}: timm is not what spec says: restore the file as it was saved")
    return {**described, "spec": spec, "base": base}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run `dvc repro pretrain`")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes: it is no encoder's description")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; restore it") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path} holds no map: it must hold spec, provenance and weights")
    return described


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
