"""LESS: two transformers, one a scale, whose class tokens read each other (Zhao et al. 2023)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.heads import _training
from stages.heads._training import Bags, Labels

SCALES = 2  # an instance is a patch's embedding followed by that of its central crop
EPSILON = 1e-6  # of layer norms
RECOMPUTE_ABOVE = 4096  # tokens: blocks are worked out again in the backward pass, not kept


@dataclass(frozen=True)
class Params:
    """Section evaluate.less of params.yaml."""

    project: bool  # true: a linear layer for each scale; false: embeddings are as wide as dims
    dims: tuple[int, int]  # numbers of a token: of crops, of patches (384, 768 in the paper)
    heads: int  # of every attention (16)
    depths: tuple[int, int]  # self-attention blocks a stage: over crops, over patches (1, 4)
    stages: int  # each ends with a cross-attention (3)
    mlp_ratio: int  # hidden units of a block's MLP, in widths of a token (4)
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        for name in ("heads", "stages", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluate.less.{name} is {getattr(self, name)}: it must be 1 or more"
                )
        if any(dim < 1 or dim % self.heads for dim in self.dims):
            raise ValueError(
                f"evaluate.less.dims is {list(self.dims)}: both must be multiples of heads, "
                f"{self.heads}"
            )
        if min(self.depths) < 0:
            raise ValueError(f"evaluate.less.depths is {list(self.depths)}: both must be 0 or more")


class Block(nn.Module):
    """A block of a vision transformer: self-attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, eps=EPSILON)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=EPSILON)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "..."] | None
    ) -> Float[Tensor, "batch token width"]:
        """Tokens where `mask` is False are not attended to; None: all are."""
        parts = self.query_key_value(self.norm_attention(tokens)).chunk(3, dim=2)
        keys = None if mask is None else mask[:, None, None]
        found = F.scaled_dot_product_attention(*(_split(part, self.heads) for part in parts), keys)
        tokens = tokens + self.out(found.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens))


class Reading(nn.Module):
    """One scale's class token, read from the instances of the other: cross-attention, no MLP."""

    def __init__(self, own: int, other: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.there = _translation(own, other)
        self.norm = nn.LayerNorm(other, eps=EPSILON)
        self.query = nn.Linear(other, other)
        self.key_value = nn.Linear(other, 2 * other)
        self.out = nn.Linear(other, other)
        self.back = _translation(other, own)

    def forward(
        self,
        class_token: Float[Tensor, "batch 1 own"],
        instances: Float[Tensor, "batch instance other"],
        mask: Bool[Tensor, "batch token"],
    ) -> tuple[Float[Tensor, "batch 1 own"], Float[Tensor, "batch instance"]]:
        """The new class token, and what it attended to, the mean over the heads."""
        asking = self.there(class_token)
        tokens = self.norm(torch.cat([asking, instances], dim=1))
        parts = [self.query(tokens[:, :1]), *self.key_value(tokens).chunk(2, dim=2)]
        query, key, value = (_split(part, self.heads) for part in parts)
        score = query @ key.transpose(2, 3) / math.sqrt(key.shape[3])  # [batch, head, 1, token]
        weights = score.masked_fill(~mask[:, None, None], float("-inf")).softmax(dim=3)
        found = self.out((weights @ value).transpose(1, 2).flatten(2))
        return self.back(asking + found), weights[:, :, 0, 1:].detach().mean(dim=1)


class Stage(nn.Module):
    """Self-attention within each scale, then both class tokens read the other scale."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        sizes = list(zip(params.dims, params.depths, strict=True))
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, params.heads, params.mlp_ratio) for _ in range(depth))
            for dim, depth in sizes
        )
        crop, patch = params.dims
        self.readings = nn.ModuleList(
            [Reading(crop, patch, params.heads), Reading(patch, crop, params.heads)]
        )

    def forward(
        self, scales: list[Float[Tensor, "batch token width"]], mask: Bool[Tensor, "batch token"]
    ) -> tuple[list[Float[Tensor, "batch token width"]], list[Float[Tensor, "batch instance"]]]:
        """Tokens of crops and of patches, the class token first, and both readings' attention."""
        keys = None if mask.all() else mask  # without a mask attention is faster
        for at, blocks in enumerate(self.blocks):
            for block in blocks:
                scales[at] = _run(block, scales[at], keys)
        class_tokens, attention = [], []
        for own, other, reading in zip(scales, scales[::-1], self.readings, strict=True):
            token, weights = reading(own[:, :1], other[:, 1:], mask)
            class_tokens.append(token)
            attention.append(weights)
        joined = zip(class_tokens, scales, strict=True)
        return [torch.cat([token, own[:, 1:]], dim=1) for token, own in joined], attention


class LESS(nn.Module):
    """The aggregator of LESS: CrossViT over the instances of a slide, at two scales.

    Source:
        Zhao et al. 2023, https://arxiv.org/abs/2306.03407, which takes its second step from
        CrossViT (Chen et al. 2021, https://arxiv.org/abs/2103.14899): no positions, and the mean
        of two linear classifiers. LESS proper trains its own encoder, of 384 and 768 outputs;
        this is its aggregator alone, for any encoder. So `project` adds a linear layer for each
        scale, and the second scale is the patch's central half as embedded by the same encoder.
        Instances are standardised by the train instances where `training` says so.

    The attention returned is that of both class tokens in the last cross-attention, the mean over
    heads and scales, without what they give themselves.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.patch_width = _patch_width(dim, params)
        self.standardise = _training.Standardise(dim)
        widths = (dim - self.patch_width, self.patch_width)
        self.project = nn.ModuleList(
            nn.Linear(width, own) if params.project else nn.Identity()
            for width, own in zip(widths, params.dims, strict=True)
        )
        self.class_tokens = nn.ParameterList(
            nn.Parameter(torch.empty(1, 1, own)) for own in params.dims
        )
        self.stages = nn.ModuleList(Stage(params) for _ in range(params.stages))
        self.norms = nn.ModuleList(nn.LayerNorm(own, eps=EPSILON) for own in params.dims)
        self.classify = nn.ModuleList(nn.Linear(own, classes) for own in params.dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw class tokens and the weights of all linear layers as CrossViT does."""
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in [*self.class_tokens, *(layer.weight for layer in layers)]:
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in layers:
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Class logits and attention; where `mask` is False an instance is padding."""
        bag = self.standardise(bag)
        parts = bag[..., self.patch_width :], bag[..., : self.patch_width]  # crops, patches
        scales = [
            torch.cat([token.expand(len(bag), -1, -1), project(part)], dim=1)
            for token, project, part in zip(self.class_tokens, self.project, parts, strict=True)
        ]
        tokens = F.pad(mask, (1, 0), value=True)
        for stage in self.stages:
            scales, attention = stage(scales, tokens)
        heads = zip(scales, self.norms, self.classify, strict=True)
        logits = sum(classify(norm(own[:, 0])) for own, norm, classify in heads) / len(scales)
        weights = (sum(attention) + torch.finfo(logits.dtype).tiny) * mask
        return logits, weights / weights.sum(dim=1, keepdim=True)

    def fit(
        self, bags_train: Bags, labels_train: Labels, bags_val: Bags, labels_val: Labels, seed: int
    ) -> None:
        """Train from new weights; see `stages.heads.Head`."""
        train, val = (bags_train, labels_train), (bags_val, labels_val)
        _training.fit(self, train, val, seed, self.params.training)

    def predict(
        self, bags: Bags
    ) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
        """Probabilities and attention; see `stages.heads.Head`."""
        return _training.predict(self, bags, self.params.training.batch)


def build(dim: int, classes: int, params: Params) -> LESS:
    """An untrained LESS for instances of `dim` numbers, those of the patch before the crop's."""
    return LESS(dim, classes, params)


def _patch_width(dim: int, params: Params) -> int:
    """How many of an instance's numbers are the patch's."""
    if params.project:
        if dim % SCALES:
            raise ValueError(
                f"instances of {dim} numbers came to the head less: it must be an even number, "
                "half of the patch and half of its crop; set embed.central_crop and embed again"
            )
        return dim // SCALES
    if dim != sum(params.dims):
        raise ValueError(
            f"evaluate.less.project is false and instances have {dim} numbers: they must have "
            f"{sum(params.dims)}, {params.dims[1]} of the patch and {params.dims[0]} of its crop; "
            "set it to true for embeddings of any width"
        )
    return params.dims[1]


def _translation(width: int, other: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, eps=EPSILON), nn.GELU(), nn.Linear(width, other))


def _split(rows: Tensor, heads: int) -> Tensor:
    """[batch, token, width] as [batch, head, token, width / heads]."""
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def _run(block: Block, tokens: Tensor, mask: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and tokens.shape[1] > RECOMPUTE_ABOVE:
        return checkpoint(block, tokens, mask, use_reentrant=False)
    return block(tokens, mask)
