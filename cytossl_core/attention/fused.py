"""SR-attention in Triton: scores never leave the chip; one bit per pair tells what was kept."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from cytossl_core.attention.inputs import Inputs

OLDEST = (3, 6)  # of Triton: tuples of tiles, absent pointers, gathers


def _unusable() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton  # noqa: PLC0415  optional

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton is {triton.__version__}, older than the {oldest} that the kernels need"
    return None


UNUSABLE = _unusable()
if UNUSABLE is None:
    import triton

    from cytossl_core.attention import operators  # noqa: F401  registers them with torch

INTERPRETED = UNUSABLE is None and triton.knobs.runtime.interpret  # read by Triton at import too

MOST_BUCKETS = 255  # a program holds the sums of a row's buckets
MOST_TOKENS = 16384
MOST_WIDTH = 256


def refusal(x: Inputs) -> str | None:
    """Why these inputs cannot take this path, or None if they can."""
    if UNUSABLE is not None:
        return UNUSABLE
    if not x.query.is_cuda and not INTERPRETED:
        return f"query is on {x.query.device}"
    if x.query.dtype == torch.float64:
        return "query is torch.float64"
    if x.query.shape[2] > MOST_TOKENS or x.query.shape[3] > MOST_WIDTH:
        most = f"{MOST_TOKENS} tokens or a width of {MOST_WIDTH}"
        return f"query has shape {tuple(x.query.shape)}, over {most}"
    if any(table.shape[1] > MOST_BUCKETS for table in x.tables.values()):
        return f"a table has more than {MOST_BUCKETS} buckets"
    if x.dropout:
        return f"dropout is {x.dropout}"
    if x.bias is not None and x.bias.requires_grad:
        return "bias requires a gradient"
    return None


def fused_attention(x: Inputs) -> Float[Tensor, "batch head token head_dim"]:
    """Equation 9 in fused kernels; the numbers of `sparse_attention`, in the query's dtype.

    Scores are float32. Weights meet values, and gradients of scores meet queries and keys, in the
    query's dtype, as in flash attention. Deterministic: no atomics, sums in a fixed order.

    Memory, in bytes per row of queries with head_dim d and e bytes per element: out d e, its
    log-sum-exp 4, kept pairs token / 8, gradients 3 d e, 4 more for backward; and, with tables, up
    to a fifth of out and gradients for programs' parts of tables' gradients (never less than 32
    programs' parts). For bfloat16, d = 64, 50 buckets, against a flash kernel's 520: 37 tokens
    528, 197 548, 257 556, 1025 652, 4097 1036, and at most 102 for tables. Bucket ids take some 6
    bytes per pair of tokens, once for all items, heads and layers.

    Source:
        Cyto-SSL, equations 3 to 9. Tiles after FlashAttention-2, https://arxiv.org/abs/2307.08691.
        The h-th largest is found on integers in the order of the scores, exactly for any h:
        `kernels_select`.
    """
    tables = (x.table_k, x.table_q, x.table_v)
    return torch.ops.cytossl.sr_forward(
        *(_unit_stride(t) for t in (x.query, x.key, x.value)),
        *(None if table is None else _float(table).contiguous() for table in tables),
        x.bias, x.buckets if x.tables else None, x.scale, 0 if x.dense else x.topk,
    )[0]  # fmt: skip


def _float(table: Tensor) -> Tensor:
    return table.float() if table.dtype == torch.float64 else table


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
