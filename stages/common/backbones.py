"""Backbones: a pretraining run's encoder before its first step."""

from typing import Protocol

from torch import nn

from stages.common import encoders, params
from stages.common.encoders import EncoderSpec


class Settings(Protocol):
    """What of section pretrain decides an encoder."""

    backbone: str
    token_px: int
    global_px: int
    drop_path: float


def describe(settings: Settings, top: params.Top, patch_px: int, mpp: float) -> EncoderSpec:
    """The spec of the encoder that `prepare` makes, for patches of `patch_px` at `mpp`."""
    return EncoderSpec(
        architecture=settings.backbone,
        image_px=settings.global_px,
        token_px=settings.token_px,
        sparse_topk=top.sparse_topk,
        irpe=top.irpe,
        mean=encoders.MEAN,
        std=encoders.STD,
        patch_px=patch_px,
        mpp=mpp,
    )


def prepare(spec: EncoderSpec, settings: Settings) -> nn.Module:
    """The encoder that `spec` describes, with the weights that `settings` ask for."""
    return encoders.build(spec, settings.drop_path)
