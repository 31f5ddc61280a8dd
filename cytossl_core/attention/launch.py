"""How the Triton kernels are started: tile sizes, strides, switches."""

import torch
import triton
from torch import Tensor
from triton import next_power_of_2

TILE_BYTES = 64 * 1024  # of keys that one program may hold: 512 tokens of 64 bfloat16


def pointers_of(query, key, value, of_query, of_key, bias, buckets) -> list[Tensor]:
    """Every pointer that a kernel takes; one that it does not read is the query's."""
    optional = [query if t is None else t for t in (of_query, of_key, bias, buckets)]
    return [query, key, value, *optional]


def arguments_of(query, key, value, of_query, of_key, bias, value_buckets, scale) -> dict:
    """Strides, sizes and switches, by the kernels' names."""
    batch, heads, token, dim = query.shape
    count = next((t.shape[-1] for t in (of_query, of_key) if t is not None), value_buckets)
    strides = {}
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        for axis, stride in zip(("batch", "head", "token"), tensor.stride(), strict=False):
            strides[f"{name}_{axis}"] = stride
    spread = (0, 0, 0, 0) if bias is None else bias.expand(batch, heads, token, token).stride()
    for axis, stride in zip(("batch", "head", "row", "column"), spread, strict=True):
        strides[f"bias_{axis}"] = stride
    sizes = {"scale": scale, "heads": heads, "token": token, "dim": dim, "count": count}
    switches = {
        "HAS_K": of_query is not None,
        "HAS_Q": of_key is not None,
        "HAS_V": value_buckets > 0,
        "HAS_BIAS": bias is not None,
        "BLOCK_C": max(16, next_power_of_2(count)),
    }
    return strides | sizes | {"words": (token + 31) // 32} | switches


def forward_tile(query: Tensor) -> dict:
    """All keys in one tile if they fit, else tiles of 64 keys.

    Sizes here and in `backward_tile` follow the compiler's report of spilled registers on sm_90.
    """
    token, dim = query.shape[2:]
    width, keys = max(16, next_power_of_2(dim)), max(32, next_power_of_2(token))
    if keys > 512 or keys * width * query.element_size() > TILE_BYTES:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": width, "num_warps": 4}
    rows = min(64, max(16, 4096 // keys))
    return {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_D": width, "num_warps": 4 + 4 * (keys > 128)}


def backward_tile(query: Tensor) -> dict:
    """Square tiles, smaller for wider heads: three are held at once, with two sums."""
    width = max(16, next_power_of_2(query.shape[3]))
    side, warps = 32 if width <= 128 else 16, 4 if query.element_size() == 2 else 8
    return {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_D": width, "num_warps": warps}


def launch(kernel, query: Tensor, block: int, pointers: list[Tensor], arguments: dict) -> None:
    """One program per block of queries, or keys, of every head of every item."""
    batch, heads, token, _ = query.shape
    programs = batch * heads * triton.cdiv(token, block)
    if programs:
        with torch.cuda.device_of(query):
            # fused multiply-adds would make a score depend on the code around it
            kernel[(programs,)](*pointers, enable_fp_fusion=False, **arguments)
