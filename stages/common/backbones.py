"""Backbones: a pretraining run's encoder before its first step.

It begins with random numbers, with released weights (`weights`), or with an encoder of this project
(`init_from`); with `adapter: lora` these stay as they are and adapters are trained beside them.
"""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from stages.common import architectures, encoders, lora, params, weights
from stages.common.spec import RANDOM, TERMS, Base, EncoderSpec, LoraParams

logger = logging.getLogger(__name__)

KEPT = ("architecture", "mean", "std")  # an encoder continues only with these
SAID = ("image_px", "token_px", "sparse_topk", "irpe", "patch_px", "mpp")  # these may change


class Settings(Protocol):
    """What of section pretrain decides an encoder."""

    backbone: str
    token_px: int
    global_px: int
    drop_path: float
    weights: str
    init_from: str
    adapter: Literal["none", "lora"]
    lora: LoraParams


def describe(settings: Settings, top: params.Top, patch_px: int, mpp: float) -> EncoderSpec:
    """The spec of the encoder that `prepare` makes, for patches of `patch_px` at `mpp`.

    Images are normalised as the weights it begins with expect them.
    """
    _check(settings)
    if settings.init_from:
        _check_place(Path(settings.init_from))
        former = encoders.describe(Path(settings.init_from))["spec"]
        mean, std = former.mean, former.std
    else:
        mean, std = architectures.normalisation(settings.backbone, settings.weights != "none")
    return EncoderSpec(
        architecture=settings.backbone,
        image_px=settings.global_px,
        token_px=settings.token_px,
        sparse_topk=top.sparse_topk,
        irpe=top.irpe,
        mean=mean,
        std=std,
        patch_px=patch_px,
        mpp=mpp,
        lora=settings.lora if settings.adapter == "lora" else None,
    )


def prepare(spec: EncoderSpec, settings: Settings) -> nn.Module:
    """The encoder that `spec` describes, with the weights that `settings` ask for.

    With `spec.lora` only adapters and tables require a gradient. `.base` says where it began.

    Raises:
        OSError: weights were not found, or not had from the hub.
        ValueError: settings do not go together, or weights do not fit.
    """
    _check(settings)
    if settings.init_from:
        return _continued(spec, settings, Path(settings.init_from))
    if settings.weights == "none":
        model = encoders.build(spec, settings.drop_path)
        model.base = RANDOM
        return model
    model = encoders.build(spec, settings.drop_path, empty=True)
    weights.fit(model, weights.read(settings.weights, spec.architecture), settings.weights)
    return _begun(model, spec, Base(settings.weights, _licence(settings), ""))


def inputs(settings: Settings) -> tuple[str, ...]:
    """Digests of the files that decide where the encoder begins."""
    if settings.init_from:
        _check_place(Path(settings.init_from))
        return (encoders.digest_of(Path(settings.init_from)),)
    path = Path(settings.weights)
    if settings.weights in ("none", "timm") or not path.is_file():
        return ()
    with path.open("rb") as opened:
        return (hashlib.file_digest(opened, "sha256").hexdigest(),)


def _check(settings: Settings) -> None:
    given = settings.weights != "none"
    if given and settings.init_from:
        raise ValueError(
            f"pretrain.weights is {settings.weights} and pretrain.init_from is "
            f"{settings.init_from}: an encoder begins with one of them; set weights to none or "
            'init_from to ""'
        )
    if settings.adapter == "lora" and not given and not settings.init_from:
        raise ValueError(
            "pretrain.adapter is lora and pretrain.weights is none: adapters need trained weights "
            "beside them; set weights or init_from"
        )


def _begun(model: nn.Module, spec: EncoderSpec, base: Base) -> nn.Module:
    if spec.lora:
        base = dataclasses.replace(base, digest=weights.digest(model))
        lora.add(model, spec.lora)
    model.base = base
    return model


def _continued(spec: EncoderSpec, settings: Settings, folder: Path) -> nn.Module:
    former, base, found = encoders.read(folder)
    _check_continues(former, spec, folder)
    if former.lora and spec.lora:
        model = encoders.with_adapters(spec, base, found, folder, settings.drop_path)
        model.base = base
        return model
    if former.lora:
        found = encoders.load(folder)[0].state_dict()
    model = encoders.build(spec, settings.drop_path, empty=True)
    weights.fit(model, found, str(folder))
    return _begun(model, spec, Base(str(folder / encoders.WEIGHTS), base.licence, ""))


def _check_continues(former: EncoderSpec, spec: EncoderSpec, folder: Path) -> None:
    """Refuse what would make other numbers of the weights; say what changes."""
    for name in KEPT:
        if getattr(former, name) != getattr(spec, name):
            raise ValueError(
                f"pretrain.init_from: the encoder in {folder} has {name} {getattr(former, name)}, "
                f"and this run {getattr(spec, name)}: they must be the same"
            )
    lost = set(TERMS[former.irpe]) - set(TERMS[spec.irpe])
    if lost:
        kept = [name for name, terms in TERMS.items() if set(TERMS[former.irpe]) <= set(terms)]
        raise ValueError(
            f"pretrain.init_from: the encoder in {folder} has irpe {former.irpe}, and this run "
            f"{spec.irpe}: its learned tables would be lost; set irpe to {' or '.join(kept)}"
        )
    if former.lora and spec.lora and former.lora != spec.lora:
        raise ValueError(
            f"pretrain.init_from: the adapters in {folder} have {former.lora}, and this run "
            f"{spec.lora}: set pretrain.lora to theirs, or merge them first with "
            f"`python -m stages.export {folder} <folder>`"
        )
    for name in SAID:
        if getattr(former, name) != getattr(spec, name):
            change = f"{name} {getattr(former, name)} -> {getattr(spec, name)}"
            logger.info("goes on from %s with another %s", folder, change)


def _licence(settings: Settings) -> str:
    if settings.weights == "timm" or settings.backbone == architectures.GIGAPATH:
        return architectures.licence(settings.backbone)
    return f"not stated in {Path(settings.weights).name}: see where that file is from"


def _check_place(folder: Path) -> None:
    own = Path("data/pretrain")
    if folder.resolve().is_relative_to(own.resolve()):
        raise ValueError(
            f"params.yaml: pretrain.init_from is {folder}: DVC empties {own} before this stage "
            "runs; copy the encoder elsewhere first, and name that folder"
        )
    for name in (encoders.DESCRIPTION, encoders.WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"params.yaml: pretrain.init_from is {folder}: it must be the folder of a saved "
                f"encoder, and there is no {name} in it; mend the path"
            )
