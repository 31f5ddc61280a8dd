"""What the benchmarks of pretraining measure with: profiles, contenders, views."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import dino_steps
from benchmarks.dino_steps import Contender
from stages.common import encoders, params
from stages.common.spec import EncoderSpec
from stages.common.training import PretrainParams
from stages.methods import dino
from stages.tile import TileParams

TINY = "vit_tiny_patch16_224"
PROFILES = {"demo": Path("params.yaml"), "paper": Path("profiles/paper.yaml")}
KINDS = {"ours": (0, "none"), "ours, top 16": (16, "none"), "ours, top 16, qkv": (16, "qkv")}


def settings_of(path: Path) -> tuple[dino.Params, EncoderSpec]:
    """DINO as a profile has it, and a dense ViT-tiny for its patches."""
    chosen = params.load(PretrainParams, "pretrain", path)
    tiles = params.load(TileParams, "tile", path)
    spec = EncoderSpec(
        TINY, chosen.global_px, chosen.token_px, 0, "none", encoders.MEAN, encoders.STD,
        tiles.patch_px, tiles.mpp,
    )  # fmt: skip
    return params.load(dino.Params, "pretrain.dino", path), spec


def contenders_of(
    spec: EncoderSpec, settings: dino.Params, device: str, kinds: Iterable[str]
) -> dict[str, Contender]:
    """Ours in some kinds, lightly and official, which are known to do what ours does."""
    made = {}
    for kind in kinds:
        topk, irpe = KINDS[kind]
        of_kind = dataclasses.replace(spec, sparse_topk=topk, irpe=irpe)
        made[kind] = dino_steps.ours(of_kind, settings, device)
    alike = {"ours": made["ours"]}
    for name in ("lightly", "official"):
        alike[name] = getattr(dino_steps, name)(made["ours"], spec)
    if device == "cpu":  # bf16 rounds apart
        small = {"image_px": 4 * spec.token_px, "patch_px": spec.patch_px}
        dino_steps.check_alike(
            alike, random_views(2, dataclasses.replace(spec, **small), settings, device)
        )
    return {**alike, **made}


def random_views(batch: int, spec: EncoderSpec, settings: dino.Params, device: str) -> list[Tensor]:
    """Noise in the shapes of views: no time depends on what they show."""
    sides = [spec.image_px] * dino.TEACHER_VIEWS + [settings.local_px] * settings.local_views
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(batch, 3, side, side, generator=generator) for side in sides]
    return [view.to(device) for view in made]
