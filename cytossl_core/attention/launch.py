"""How the Triton kernels are started: tile sizes, strides, programs."""

import torch
import triton
from torch import Tensor
from triton import next_power_of_2
from triton.runtime.errors import OutOfResources

from cytossl_core.attention.bucket_plan import Plan, plan_of

WHOLE_TOKENS, MOST_WHOLE = 320, 512  # whose scores a program holds, with half the rows from 321
SORTED = False  # how scores in registers are selected: sorted tops, or bisection
MOST_SORTED = 64  # h up to which longer sequences keep sorted tops: two passes, else up to 13
TABLE_SHARE = 0.2  # of the bytes of out and gradients: what parts of tables' gradients may take
FEWEST_PROGRAMS = 32

_fitting = {}  # which of the tiles fitted the device's shared memory, by what was asked


def forward_tiles(token: int, dim: int, topk: int, tables: bool, half: bool) -> list[dict]:
    """Tiles to try, the first that fits shared memory is taken.

    topk 0 is dense; tables: whether there are any; half: whether elements have 2 bytes. Sizes
    here and in `backward_tiles` follow the compiler's report of registers on sm_90.
    """
    whole, dense = token <= MOST_WHOLE, topk == 0
    tops = max(2, next_power_of_2(topk))
    many = half and (token <= WHOLE_TOKENS or not whole)
    rows, columns = 32 if many else 16, 32 if token <= 32 else 64
    common = {"WHOLE": whole, "DENSE": dense, "BLOCK_D": max(16, next_power_of_2(dim))}
    few = half and not tables and (token <= 256 or not whole)
    common |= {"num_warps": 4 if few else 8, "num_stages": 2}
    made = []
    for m, n in ((rows, columns), (16, columns), (16, 32)):
        in_order = not dense and tops <= min(n, MOST_SORTED) and (SORTED or not whole)
        own = {"BLOCK_M": m, "BLOCK_N": n, "TILES": triton.cdiv(token, n) if whole else 1}
        own |= {"SORTED": in_order, "BLOCK_H": tops if in_order else 2}
        made.append(common | own)
    return made


def backward_tiles(token: int, dim: int, tables: bool, half: bool) -> list[dict]:
    """Tiles to try: BLOCK_M own rows of a program against BLOCK_N at a time."""
    sizes = [(64, 64, 4), (32, 64, 8), (32, 32, 8), (16, 32, 4)]
    most = 32 if tables or dim > 64 or not half else 64  # rows, for registers' sake
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": max(16, next_power_of_2(dim)),
         "num_warps": warps, "num_stages": 1}
        for m, n, warps in sizes
        if m <= most and (n <= 32 or (token > 32 and half))
    ]  # fmt: skip


def strides_of(names: str, tensors: tuple[Tensor, ...]) -> dict:
    """Strides of batch, head and token, under the kernels' names."""
    axes = ("batch", "head", "token")
    return {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in zip(names, tensors, strict=True)
        for i, axis in enumerate(axes)
    }


def arguments_of(query, table_k, table_q, table_v, bias, scale) -> dict:
    """What kernels are told about sizes, tables and bias; a table for all heads has stride 0."""
    batch, heads, token, dim = query.shape
    spread = (0,) * 4 if bias is None else bias.expand(batch, heads, token, token).stride()
    made = {f"bias_{a}": s for a, s in zip(("batch", "head", "row", "column"), spread, strict=True)}
    count = 0
    for name, table in (("k", table_k), ("q", table_q), ("v", table_v)):
        made[f"{name}_table"] = 0 if table is None or len(table) == 1 else table.stride(0)
        count = count if table is None else table.shape[1]
    sizes = {"scale": scale, "heads": heads, "token": token, "dim": dim, "count": count}
    return made | sizes | {"words": (token + 31) // 32}


def planned(buckets: Tensor | None, count: int, token: int, tile: dict) -> tuple[list, dict]:
    """What a kernel reads of the bucket ids for a tile, and the sizes that go with it."""
    size = max(16, next_power_of_2(count + 1)) if count else 16
    width = triton.cdiv(token, tile["BLOCK_N"]) * tile["BLOCK_N"]
    if not count:
        return [None] * 4, {"width": width, "BLOCK_C": size}
    plan: Plan = plan_of(buckets, count, tile["BLOCK_N"], size)
    ids = [plan.ids, plan.ids_t, plan.order, plan.last]
    return ids, {"width": width, "BLOCK_C": size}


def programs_of(query: Tensor, tables: list, blocks: int, processors: int) -> int:
    """Programs of a backward kernel: one per block, or few, that add up tables' gradients."""
    tables = [t for t in tables if t is not None]
    if not tables:
        return blocks
    part = sum(t.shape[1] * t.shape[2] * 4 for t in tables)
    share = int(TABLE_SHARE * 4 * query.numel() * query.element_size() / part)
    return max(1, min(blocks, max(FEWEST_PROGRAMS, share), processors))


def processors(query: Tensor) -> int:
    """Multiprocessors of the device; a few where kernels are interpreted."""
    if not query.is_cuda:
        return 7
    return torch.cuda.get_device_properties(query.device).multi_processor_count


def launch(start, kernel, query: Tensor, tiles: list[dict], key: tuple) -> None:
    """Calls start(tile) with the first tile whose kernel fits the device's shared memory.

    Raises:
        ValueError: none fits.
    """
    key = (kernel, query.device, query.dtype, query.shape[2:], *key)
    for i in range(_fitting.get(key, 0), len(tiles)):
        try:
            with torch.cuda.device_of(query):
                start(tiles[i])
        except OutOfResources as error:
            why = error
            continue
        _fitting[key] = i
        return
    raise ValueError(
        f"head_dim is {query.shape[3]} in {query.dtype}, which {query.device} has too little "
        f"shared memory for ({why}): take backend 'torch'"
    )
