"""Triton kernels of SR-attention: tiles of scores, exact selection, no atomics."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

PADDING = tl.constexpr(-2147483648)  # key of a column outside the sequence
LOWEST = tl.constexpr(-2139095041)  # key of -inf
NAN = tl.constexpr(0x7F800001)  # key of any NaN, above inf's
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def product(a, b):
    """Matrix product in float32; the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
@no_type_check
def load_rows(start, rows, stride, token, dim, BLOCK_D: tl.constexpr):
    """A block of rows of [token, dim], zeros outside."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < token) & (column[None, :] < dim)
    return tl.load(start + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_rows(start, rows, values, token, dim, BLOCK_D: tl.constexpr):
    """Writes a block of rows of a contiguous [token, dim]."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < token) & (column[None, :] < dim)
    tl.store(start + rows[:, None] * dim + column[None, :], values, mask=inside)


@triton.jit
@no_type_check
def load_ids(ids, rows, columns, token):
    """Bucket ids of a tile."""
    inside = (rows < token) & (columns < token)
    return tl.load(ids + rows * token + columns, mask=inside, other=0).to(tl.int32)


@triton.jit
@no_type_check
def score_tile(
    q, k, q_table, k_table, bias, ids, rows, columns, scale, token, count, bias_row, bias_column,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Equation 8 for a tile, in float32; q_table is scale q r^K, k_table is scale k r^Q."""
    rows, columns = rows[:, None], columns[None, :]
    inside = (rows < token) & (columns < token)
    scores = product(q, tl.trans(k)) * scale
    if HAS_K:
        bucket = load_ids(ids, rows, columns, token)
        scores += tl.load(q_table + rows * count + bucket, mask=inside, other=0.0)
    if HAS_Q:
        bucket = load_ids(ids, columns, rows, token)
        scores += tl.load(k_table + columns * count + bucket, mask=inside, other=0.0)
    if HAS_BIAS:
        place = bias + rows * bias_row + columns * bias_column
        scores += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return scores


@triton.jit
@no_type_check
def ordered(scores, columns, token):
    """Integers in the order of the scores: equal zeros, NaN on top, padding at the bottom."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(scores != scores, NAN, keys)
    return tl.where(columns[None, :] < token, keys, PADDING)


@triton.jit
@no_type_check
def bisect(low, high, done, count, topk):
    """One step: `low` stays at or below the topk-th largest key, `high` above it."""
    middle = middle_of(low, high)
    low = tl.where((count >= topk) & ~done, middle, low)
    high = tl.where((count < topk) & ~done, middle, high)
    return low, high, done | (count == topk) | (low + 1 >= high)


@triton.jit
@no_type_check
def middle_of(low, high):
    """Mean without overflow, rounded down."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
@no_type_check
def any_of(flags):
    """Whether a flag of a vector is set."""
    return tl.max(flags.to(tl.int32), axis=0) > 0


@triton.jit
@no_type_check
def pack(keep, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """32 flags to a word, the first one lowest."""
    bits = tl.reshape(keep.to(tl.int32), [BLOCK_M, BLOCK_N // 32, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
@no_type_check
def store_kept(kept, keep, rows, start, token, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes the flags of a tile that starts at column `start`."""
    word = start // 32 + tl.arange(0, BLOCK_N // 32)
    place = kept + rows[:, None] * words + word[None, :]
    inside = (rows[:, None] < token) & (word[None, :] < words)
    tl.store(place, pack(keep, BLOCK_M, BLOCK_N), mask=inside)


@triton.jit
@no_type_check
def load_kept(kept, rows, columns, token, words):
    """Reads the flags of a tile."""
    inside = (rows[:, None] < token) & (columns[None, :] < token)
    place = kept + rows[:, None] * words + columns[None, :] // 32
    word = tl.load(place, mask=inside, other=0)
    return ((word >> (columns[None, :] % 32)) & 1) == 1


@triton.jit
@no_type_check
def bucket_sums(sums, values, bucket, count, AXIS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds to sums[i, c] the values of row (AXIS 1) or column (AXIS 0) i in bucket c, in order."""
    column = tl.arange(0, BLOCK_C)
    for c in range(count):
        one = tl.sum(tl.where(bucket == c, values, 0.0), axis=AXIS)
        sums += tl.where(column[None, :] == c, one[:, None], 0.0)
    return sums


@triton.jit
@no_type_check
def finish(
    acc, total, largest, sums, rows, out, lse, hist, token, dim, count,
    HAS_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Divides by the sums of weights and writes a block of queries' results."""
    divisor = tl.where(total == 0, 1.0, total)  # a row without keys gives zeros
    store_rows(out, rows, acc / divisor[:, None], token, dim, BLOCK_D)
    tl.store(lse + rows, largest + tl.log(divisor), mask=rows < token)
    if HAS_V:
        store_rows(hist, rows, sums / divisor[:, None], token, count, BLOCK_C)
