"""Image relative position encoding: which row of a table serves each pair of tokens."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cytossl_core.attention.tracing import transformed

METHODS = ("product", "euclidean", "quantization", "cross")


@dataclass(frozen=True)
class Origin:
    """What ids were made from."""

    height: int
    width: int
    special_tokens: int
    method: str
    ratio: float
    count: int  # buckets
    version: int  # of the tensor, which grows when someone writes into it


_ORIGINS = WeakTensorKeyDictionary()


def origin(ids: Int64[Tensor, "token token"]) -> Origin | None:
    """What `irpe_buckets` made these ids from; None for others, or if they were changed since."""
    made = _ORIGINS.get(ids)
    return made if made is not None and made.version == ids._version else None


def irpe_buckets(
    height: int,
    width: int,
    *,
    method: str = "product",
    ratio: float = 1.9,
    special_tokens: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Int64[Tensor, "token token"], int]:
    """Bucket of every (query, key) pair of a height x width grid of tokens.

    Buckets depend on offsets only (query minus key, in tokens), so one table serves every grid.
    The result is cached and shared: never write into it.

    Args:
        height: Rows of the token grid.
        width: Columns of the token grid.
        method: "product" (row and column offset apart), "euclidean" (rounded distance),
            "quantization" (squared distance), or "cross" (a row and a column table, summed: the
            ids are product's, and `cross_table` makes the table that they read).
        ratio: Scales the piecewise function; offsets up to `ratio` keep a bucket each, from about
            8 x ratio on they share one. 1.9 in the published models.
        special_tokens: Tokens before the grid (class, registers). If any, one more bucket, the
            last, serves every pair with a special token.
        device: Where the ids live.

    Returns:
        ids, `ids[i, j]` being the table row for query i and key j, and the number of buckets.

    Raises:
        ValueError: an unknown method, an empty grid, a ratio not above 0 or infinite, negative
            special_tokens.

    Source:
        Wu et al. 2021, Rethinking and Improving Relative Position Encoding for Vision
        Transformer, equations 18 to 22, https://arxiv.org/abs/2107.14222; numbers as in the
        official code. As there, the Euclidean and quantization tables have rows for negative
        distances that no pair reads.
    """
    _check(height, width, method, ratio, special_tokens)
    ids = _constant_ids(height, width, method, ratio, special_tokens, torch.device(device))
    return ids, bucket_count(method, ratio, special_tokens)


def bucket_count(method: str, ratio: float, special_tokens: int) -> int:
    """Number of buckets that `irpe_buckets` uses, known without a grid."""
    side = 2 * int(2 * ratio) + 1
    return (side**2 if method in ("product", "cross") else side) + (special_tokens > 0)


def table_rows(method: str, ratio: float, special_tokens: int) -> int:
    """Rows of a learned table: the bucket count, but for cross, which keeps rows and columns."""
    if method != "cross":
        return bucket_count(method, ratio, special_tokens)
    return 2 * (2 * int(2 * ratio) + 1 + (special_tokens > 0))


def cross_table(
    table: Float[Tensor, "head rows head_dim"], special_tokens: int
) -> Float[Tensor, "head bucket head_dim"]:
    """The product table that equals a row table plus a column table, stacked in `table`.

    Source:
        Wu et al. 2021, cross method: two encodings, added; each has its own special bucket.
    """
    along_row, along_column = table.chunk(2, dim=1)
    special = special_tokens > 0
    side = along_row.shape[1] - special
    total = along_row[:, :side, None] + along_column[:, None, :side]  # [head, side, side, head_dim]
    total = total.flatten(1, 2)
    if special:
        total = torch.cat([total, along_row[:, side:] + along_column[:, side:]], dim=1)
    return total


def _check(height: int, width: int, method: str, ratio: float, special_tokens: int) -> None:
    if method not in METHODS:
        raise ValueError(f"iRPE method is {method!r}: choose one of {', '.join(METHODS)}")
    if height < 1 or width < 1:
        raise ValueError(f"token grid is {height} x {width}: both sides must be at least 1")
    if not 0 < ratio < math.inf:
        raise ValueError(f"iRPE ratio is {ratio}: it must be above 0 and finite (1.9 in the paper)")
    if special_tokens < 0:
        raise ValueError(f"special_tokens is {special_tokens}: it must be 0 or more")


def _piecewise(distance: int, ratio: float) -> int:
    """Equation 18 of iRPE for a distance >= 0: exact up to alpha, then logarithmic, then clipped.

    The official code rounds half to even, clips at beta and truncates, beta not being whole.
    """
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    if distance <= alpha:
        return round(distance)
    steps = math.log(distance / alpha) / math.log(gamma / alpha) * (beta - alpha)
    return int(min(round(alpha + steps), beta))


def _grid_ids(height: int, width: int, method: str, ratio: float) -> Int64[Tensor, "grid grid"]:
    beta = int(2 * ratio)
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    down, right = row[:, None] - row, column[:, None] - column  # query minus key
    if method in ("product", "cross"):
        axis = torch.tensor([_piecewise(x, ratio) for x in range(max(height, width))])
        signed = torch.cat([-axis[1:].flip(0), axis]) + beta  # index 0 is the most negative offset
        zero = len(axis) - 1
        return signed[down + zero] * (2 * beta + 1) + signed[right + zero]
    power = 0.5 if method == "euclidean" else 1.0
    table = [
        [_piecewise(_distance(y, x, power), ratio) for x in range(width)] for y in range(height)
    ]
    return torch.tensor(table)[down.abs(), right.abs()] + beta


def _distance(down: int, right: int, power: float) -> int:
    """The rounded Euclidean distance, or its square for quantization."""
    return round((down**2 + right**2) ** power)


@torch.compiler.assume_constant_result
def _constant_ids(*key) -> Tensor:
    """The ids, from the cache unless what is made here is fake or wrapped and must not enter it."""
    if transformed() or type(torch.empty(0)) is not Tensor:
        return _ids(*key)
    if origin(_cached_ids(*key)) is None:  # someone wrote into them
        _cached_ids.cache_clear()
    return _cached_ids(*key)


@lru_cache(maxsize=16)
def _cached_ids(*key) -> Tensor:
    with torch.inference_mode(False):  # training may follow an evaluation
        ids = _ids(*key)
    height, width, method, ratio, special_tokens, _ = key
    count = bucket_count(method, ratio, special_tokens)
    _ORIGINS[ids] = Origin(height, width, special_tokens, method, ratio, count, ids._version)
    return ids


def _ids(
    height: int, width: int, method: str, ratio: float, special_tokens: int, device: torch.device
) -> Tensor:
    special_id = bucket_count(method, ratio, special_tokens) - 1
    token = special_tokens + height * width
    ids = torch.full((token, token), special_id)
    ids[special_tokens:, special_tokens:] = _grid_ids(height, width, method, ratio)
    return ids.to(device)
