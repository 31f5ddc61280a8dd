"""with_sr_attention: put SRAttention in the place of a model's own attention."""

import copy
import inspect
from functools import partial

import torch
from torch import nn

from cytossl_core.attention.grid import ToldGrid
from cytossl_core.attention.layer import SRAttention

TIMM = ("timm.layers.attention", "Attention.forward")  # by name: the core does without timm
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

    The model is changed and returned. Tables start at zero, so topk=None changes no number. Tables
    of an earlier swap are kept. From then on the model's patch embedding tells the layers the token
    grid of each call.

    Args:
        model: One whose blocks hold timm's Attention, or one that computes the same, as `.attn`.
        topk: h, see `SRAttention`; None is dense.
        irpe: Which tables, see `SRAttention`.
        method: See `irpe_buckets`.
        ratio: See `irpe_buckets`.
        shared_head: Whether heads share a table.
        special_tokens: Tokens before the grid; None asks `model.num_prefix_tokens`, as timm's.
        backend: See `sr_attention`.

    Raises:
        ValueError: no block fits, an attention computes something else (rotary or window
            positions, parts of its own), the number of special tokens is unknown, learned tables
            would be lost, or a token's place is unknown (no patch embedding as timm's, patches
            that are left out).
    """
    special_tokens = _special_tokens(model) if special_tokens is None else special_tokens
    blocks = [m for m in model.modules() if hasattr(getattr(m, "attn", None), "num_heads")]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block with .attn that has .qkv, .proj and .num_heads"
        )
    embed = _patch_embed(model) if irpe != "none" else None
    settings = {"method": method, "ratio": ratio, "shared_head": shared_head, "backend": backend}
    settings |= {"topk": topk, "irpe": irpe, "special_tokens": special_tokens}
    layers = [_from_attention(block.attn, **settings) for block in blocks]
    told = [block.attn.told for block in blocks if getattr(block.attn, "told", None) is not None]
    if embed is not None and not told:
        told = [ToldGrid()]
        embed.register_forward_pre_hook(told[0].tell)
    for block, layer in zip(blocks, layers, strict=True):
        layer.told = told[0] if told else None
        block.attn = layer
    _undecay_tables(model)
    return model


def _special_tokens(model: nn.Module) -> int:
    count = getattr(model, "num_prefix_tokens", None)
    if count is None:
        raise ValueError(
            f"{type(model).__name__} has no num_prefix_tokens: give special_tokens, the number of "
            "tokens before the grid"
        )
    return count


def _patch_embed(model: nn.Module) -> nn.Module:
    """The part that sees images and knows their token grid."""
    name = type(model).__name__
    embed = getattr(model, "patch_embed", None)
    if not hasattr(embed, "dynamic_feat_size"):
        raise ValueError(
            f"{name} has no .patch_embed with dynamic_feat_size, so the token grid is unknown "
            "(NaFlex has none): take irpe='none', or a model with timm's PatchEmbed"
        )
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0)
    if rate > 0:
        raise ValueError(
            f"{name} has patch_drop_rate {rate}, and a token's place is lost when others are left "
            "out: make it with patch_drop_rate=0, or take irpe='none'"
        )
    return embed


def _undecay_tables(model: nn.Module) -> None:
    """Add the tables to those that timm's optimizers spare weight decay, if the model has such."""
    if hasattr(model, "no_weight_decay"):
        tables = {name for name, _ in model.named_parameters() if "attn.table_" in name}
        model.no_weight_decay = partial(set, frozenset(model.no_weight_decay()) | tables)


def _from_attention(attention: nn.Module, **settings) -> SRAttention:
    """An SRAttention around the projections and norms of another attention."""
    _check_parts(attention)
    weight = attention.qkv.weight
    layer = SRAttention(
        attention.qkv.in_features,
        attention.num_heads,
        attn_head_dim=attention.qkv.out_features // 3 // attention.num_heads,
        device="meta",  # nothing is drawn from the random stream: every part is replaced
        dtype=weight.dtype,
        **settings,
    )
    for name in KEPT:
        part = getattr(attention, name, None)
        if part is not None:
            setattr(layer, name, part)
    layer.scale = getattr(attention, "scale", layer.scale)
    layer.train(attention.training)
    for name, table in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.zeros_like(table, device=weight.device)))
    if isinstance(attention, SRAttention):
        _keep_tables(layer, attention)
    else:
        _check_numbers(attention, layer)
    return layer


def _keep_tables(layer: SRAttention, before: SRAttention) -> None:
    same_buckets = (layer.method, layer.ratio) == (before.method, before.ratio)
    for name, table in before.named_parameters(recurse=False):
        new = getattr(layer, name)
        if same_buckets and new is not None and new.shape == table.shape:
            setattr(layer, name, table)
        elif not table.is_meta and table.any():
            found = "has none" if new is None else f"has {tuple(new.shape)}"
            raise ValueError(
                f"{name} is learned, {tuple(table.shape)} with {before.method} buckets of ratio "
                f"{before.ratio}, and would be lost: irpe {layer.irpe!r} {found} with "
                f"{layer.method} buckets of ratio {layer.ratio}; take the first swap's settings"
            )


def _check_parts(attention: nn.Module) -> None:
    """Refuse an attention that has other parts than SRAttention."""
    name = type(attention).__name__
    if not isinstance(getattr(attention, "qkv", None), nn.Linear) or not hasattr(attention, "proj"):
        raise ValueError(f"{name} has no fused .qkv and .proj: SRAttention cannot take its place")
    arguments = set(inspect.signature(attention.forward).parameters) - {"attn_mask", "is_causal"}
    own = {part.split(".")[0] for part, _ in attention.named_parameters()} - set(KEPT)
    if not isinstance(attention, SRAttention) and (len(arguments) > 1 or own):
        extra = ", ".join(sorted(own) or sorted(arguments))
        raise ValueError(f"{name} works with {extra}: SRAttention cannot take its place")


@torch.no_grad()
def _check_numbers(attention: nn.Module, layer: SRAttention) -> None:
    """Refuse an attention that is not timm's and computes something else than a dense layer."""
    forward = type(attention).forward
    if (forward.__module__, forward.__qualname__) == TIMM and "forward" not in vars(attention):
        return
    theirs, ours = (copy.deepcopy(module).double().eval() for module in (attention, layer))
    ours.topk, ours.backend = None, "auto"
    shape = (2, layer.special_tokens + 9, attention.qkv.in_features)
    random = torch.Generator().manual_seed(0)
    tokens = 10 * torch.randn(shape, generator=random, dtype=torch.float64)
    tokens, why = tokens.to(attention.qkv.weight.device), ""
    try:
        close = torch.allclose(theirs(tokens), ours(tokens))
    except Exception as error:  # it expects something else than tokens
        close, why = False, f" ({error})"
    if not close:
        raise ValueError(
            f"{type(attention).__name__} gives other numbers than timm's Attention{why}: "
            "SRAttention cannot take its place"
        )
