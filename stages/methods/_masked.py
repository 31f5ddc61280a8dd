"""Masked tokens for DINO, as iBOT and DINOv2 have them: which, and how they are hidden."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from stages.common import chance

_BLOCKS = 12  # rectangles that are tried until enough tokens are masked
_STREAM = 2**20  # numbers of random streams from here on are masks, those below are views


@dataclass(frozen=True)
class Masking:
    """Section pretrain.dino.ibot of params.yaml; in brackets what DINOv2 has. Not in Cyto-SSL."""

    weight: float  # of the loss at masked tokens; 0: none is computed (1)
    chance: float  # that a global view is masked (0.5)
    share: tuple[float, float]  # of a view's tokens, least and most (0.1, 0.5)

    def __post_init__(self) -> None:
        """Refuse shares outside 0 to 1."""
        low, high = self.share
        if self.weight < 0 or not 0 <= self.chance <= 1 or not 0 < low <= high < 1:
            raise ValueError(
                f"params.yaml: pretrain.dino.ibot is {self}: weight must be 0 or more, chance from "
                "0 to 1, share two numbers above 0 and below 1, the smaller first"
            )


def masks(
    keys: Int64[Tensor, " batch"], view: int, side: int, masking: Masking
) -> Bool[Tensor, "batch token"]:
    """Which tokens of a side x side grid are masked: rectangles, from the patch's key alone.

    Source:
        Blocks after Bao et al. 2022, BEiT, Algorithm 1, https://arxiv.org/abs/2106.08254.
    """
    drawn = chance.uniform(keys, _STREAM + view, 2 + 4 * _BLOCKS)
    low, high = masking.share
    wanted = np.where(drawn[0] < masking.chance, low + drawn[1] * (high - low), 0) * side**2
    found = np.zeros((len(keys), side, side), bool)
    for row, count in enumerate(np.round(wanted).astype(int)):
        for area, aspect, down, right in drawn[2:, row].reshape(-1, 4):
            missing = count - int(found[row].sum())
            if missing <= 0:
                break
            _cover(found[row], 1 + area * (missing - 1), aspect, down, right)
    return torch.from_numpy(found).flatten(1)


def _cover(grid: np.ndarray, area: float, aspect: float, down: float, right: float) -> None:
    """Mask one rectangle of about `area` tokens, 0.3 to 3.3 times as high as wide."""
    ratio = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
    side = len(grid)
    height, width = (
        min(side, max(1, round(math.sqrt(number)))) for number in (area * ratio, area / ratio)
    )
    top, left = int(down * (side - height + 1)), int(right * (side - width + 1))
    grid[top : top + height, left : left + width] = True


def require_tokens(encoder: nn.Module) -> None:
    """Refuse an encoder whose tokens cannot be masked.

    Raises:
        ValueError: it has no `patch_embed`, or no class token to tell images apart by.
    """
    if not hasattr(encoder, "patch_embed") or not getattr(encoder, "num_prefix_tokens", 0):
        raise ValueError(
            f"params.yaml: pretrain.dino.ibot.weight is above 0: {type(encoder).__name__} has no "
            "tokens to mask beside a class token, set it to 0 or choose a vision transformer"
        )


@contextmanager
def hidden(
    encoder: nn.Module, masked: Bool[Tensor, "batch token"], mask_token: Float[Tensor, " dim"]
) -> Iterator[None]:
    """Inside, the encoder sees `mask_token` in the place of masked tokens."""

    def replace(_: nn.Module, __: tuple, tokens: Tensor) -> Tensor:
        where = masked.to(tokens.device).view(*tokens.shape[:-1], 1)
        return torch.where(where, mask_token.to(tokens.dtype), tokens)

    hook = encoder.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
