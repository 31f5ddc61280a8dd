"""What an encoder is: the settings that its description, encoder.json, carries."""

import math
from dataclasses import dataclass

TERMS = {"none": "", "k": "k", "qk": "qk", "qkv": "qkv"}  # irpe: the tables that it has
MOST_PX = 16384  # side of an image; more is a mistake or an attack on the memory


@dataclass(frozen=True)
class LoraParams:
    """Section pretrain.lora: low-rank adapters beside frozen weights.

    Source:
        Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; alpha / rank scales what they add.
    """

    rank: int  # of what an adapter adds to a matrix
    alpha: float  # over rank: scale of what it adds
    dropout: float  # share of an adapter's inputs that are zero in training

    def __post_init__(self) -> None:
        """Refuse adapters that add nothing."""
        _require("pretrain.lora.rank", self.rank, self.rank >= 1, "1 or more")
        _require("pretrain.lora.alpha", self.alpha, self.alpha > 0, "above 0")
        _require("pretrain.lora.dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")


@dataclass(frozen=True)
class Base:
    """Where training began."""

    weights: str  # none (random numbers), timm, or the path of a safetensors file
    licence: str  # of those weights
    digest: str  # of those weights, where adapters need them again; else empty


RANDOM = Base("none", "", "")


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is and what it expects to see."""

    architecture: str  # timm's name of a vision transformer or ResNet, e.g. vit_tiny_patch16_224
    image_px: int  # side of the image that an embedding is made from, pixels
    token_px: int  # side of a token, pixels of that image; 0: there are none (ResNet)
    sparse_topk: int  # keys that a query attends to; 0: all
    irpe: str  # relative position terms of the attention: none, k, qk or qkv
    mean: tuple[float, float, float]  # of red, green, blue in 0 to 1; taken off the image
    std: tuple[float, float, float]  # divides what is left
    patch_px: int  # side of the patches it was trained on, pixels
    mpp: float  # of those patches, microns per pixel
    lora: LoraParams | None = None  # adapters beside frozen weights; None: all weights are its own

    def __post_init__(self) -> None:
        """Refuse what no encoder can be: descriptions come from elsewhere, too."""
        within = 1 <= self.image_px <= MOST_PX
        _require("image_px", self.image_px, within, f"from 1 to {MOST_PX}")
        _require("token_px", self.token_px, self.token_px >= 0, "1 or more, or 0 for a ResNet")
        _require("sparse_topk", self.sparse_topk, self.sparse_topk >= 0, "0 or more")
        _require("irpe", self.irpe, self.irpe in TERMS, f"one of {', '.join(TERMS)}")
        _require("std", self.std, min(self.std) > 0, "above 0")
        _require("patch_px", self.patch_px, self.patch_px >= 1, "1 or more")
        _require("mpp", self.mpp, 0 < self.mpp < math.inf, "above 0")


def _require(name: str, value: object, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: it must be {what}")
