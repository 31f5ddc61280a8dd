"""with_sr_attention: put SRAttention in the place of a model's own attention."""

import inspect

import torch
from torch import nn

from cytossl_core.attention.layer import SRAttention

KEPT = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


def with_sr_attention(
    model: nn.Module,
    topk: int | None = 16,
    irpe: str = "qkv",
    *,
    method: str = "product",
    ratio: float = 1.9,
    shared_head: bool = True,
    special_tokens: int | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Swap SRAttention into every block of `model` that holds `.attn`; weights are kept.

    The model is changed and returned. Tables start at zero, so topk=None changes no number.

    Args:
        model: Any whose blocks hold `.attn` with `.qkv`, `.proj` and `.num_heads`, as timm's ViTs.
        topk: h, see `SRAttention`; None is dense.
        irpe: Which tables, see `SRAttention`.
        method: See `irpe_buckets`.
        ratio: See `irpe_buckets`.
        shared_head: Whether heads share a table.
        special_tokens: Tokens before the grid; None asks `model.num_prefix_tokens`, as timm's.
        backend: See `sr_attention`.

    Raises:
        ValueError: no block fits, an attention computes what SRAttention does not (rotary or
            window positions, parts of its own), or the number of special tokens is unknown.
    """
    special_tokens = _special_tokens(model) if special_tokens is None else special_tokens
    blocks = [m for m in model.modules() if hasattr(getattr(m, "attn", None), "num_heads")]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block with .attn that has .qkv, .proj and .num_heads"
        )
    for block in blocks:
        _check_replaceable(block.attn)
    settings = {"method": method, "ratio": ratio, "shared_head": shared_head, "backend": backend}
    for block in blocks:
        layer = _from_attention(
            block.attn, topk=topk, irpe=irpe, special_tokens=special_tokens, **settings
        )
        layer.grid = _fixed_grid(model)
        block.attn = layer
    return model


def _special_tokens(model: nn.Module) -> int:
    count = getattr(model, "num_prefix_tokens", None)
    if count is None:
        raise ValueError(
            f"{type(model).__name__} has no num_prefix_tokens: give special_tokens, the number of "
            "tokens before the grid"
        )
    return count


def _fixed_grid(model: nn.Module) -> tuple[int, int] | None:
    """The token grid of a model made for one image size, unless square: None infers that."""
    embed = getattr(model, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if grid is None or grid[0] == grid[1] or getattr(model, "dynamic_img_size", False):
        return None
    return tuple(grid)


def _check_replaceable(attention: nn.Module) -> None:
    """Refuse an attention whose numbers SRAttention would not reproduce."""
    name = type(attention).__name__
    if not isinstance(getattr(attention, "qkv", None), nn.Linear) or not hasattr(attention, "proj"):
        raise ValueError(f"{name} has no fused .qkv and .proj: SRAttention cannot take its place")
    arguments = set(inspect.signature(attention.forward).parameters) - {"attn_mask", "is_causal"}
    own = {part.split(".")[0] for part, _ in attention.named_parameters()} - set(KEPT)
    if not isinstance(attention, SRAttention) and (len(arguments) > 1 or own):
        extra = ", ".join(sorted(own) or sorted(arguments))
        raise ValueError(f"{name} works with {extra}: SRAttention cannot take its place")


def _from_attention(attention: nn.Module, **settings) -> SRAttention:
    """An SRAttention around the projections and norms of another attention."""
    width = attention.qkv.out_features // 3
    weight = attention.qkv.weight
    layer = SRAttention(
        attention.qkv.in_features,
        attention.num_heads,
        attn_head_dim=width // attention.num_heads,
        device="meta",  # nothing is drawn from the random stream: every part is replaced
        dtype=weight.dtype,
        **settings,
    )
    for name in KEPT:
        part = getattr(attention, name, None)
        if part is not None:
            setattr(layer, name, part)
    for name, table in layer.named_parameters(recurse=False):
        zeros = torch.zeros_like(table, device=weight.device)
        setattr(layer, name, nn.Parameter(zeros))
    layer.scale = getattr(attention, "scale", layer.scale)
    return layer.train(attention.training)
