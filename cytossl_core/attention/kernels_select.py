"""The h-th largest score of each row, exactly: three ways, on integers in the scores' order.

Which way is the fastest for scores in registers (bisection with early exit, or sorted tops) wants
a GPU to tell: `launch.SORTED` chooses.
"""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

PADDING = tl.constexpr(-2147483648)  # key of a column outside the sequence
LOWEST = tl.constexpr(-2139095041)  # key of -inf
NAN = tl.constexpr(0x7FC00000)  # key of any NaN, above inf's
PROBES = tl.constexpr(8)  # of a pass over keys that are computed again: 3 bits each


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
def scores_of(keys):
    """The scores again; NaN for padding."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def count_nan(keys):
    """NaNs of a row: nothing is below an h-th largest of NaN, so h of them keep every key."""
    return tl.sum((keys == NAN).to(tl.int32), axis=1)


@triton.jit
@no_type_check
def any_of(flags):
    """Whether a flag of a vector is set."""
    return tl.max(flags.to(tl.int32), axis=0) > 0


@triton.jit
@no_type_check
def bisected(keys, high, rows, token, topk, TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """By halving [LOWEST, high): at most 32 counts, fewer once each row has topk above."""
    low = tl.full([BLOCK_M], LOWEST, tl.int32)
    done = (rows >= token) | (low + 1 >= high)
    while any_of(~done):
        middle = (low & high) + ((low ^ high) >> 1)  # without overflow
        count = tl.zeros([BLOCK_M], tl.int32)
        for t in tl.static_range(TILES):
            count += tl.sum((keys[t] >= middle[:, None]).to(tl.int32), axis=1)
        low = tl.where((count >= topk) & ~done, middle, low)
        high = tl.where((count < topk) & ~done, middle, high)
        done = done | (count == topk) | (low + 1 >= high)
    return low


@triton.jit
@no_type_check
def join_tops(tops, keys, BLOCK_H: tl.constexpr):
    """The BLOCK_H largest of both, ascending: `tops` is [row, BLOCK_H], ascending."""
    return tl.bitonic_merge(tl.maximum(tops, tl.topk(keys, BLOCK_H)))


@triton.jit
@no_type_check
def from_top(tops, topk, BLOCK_H: tl.constexpr):
    """The topk-th from the top of ascending keys, LOWEST if there are fewer."""
    column = tl.arange(0, BLOCK_H)[None, :]
    return tl.maximum(tl.sum(tl.where(column == BLOCK_H - topk, tops, 0), axis=1), LOWEST)


@triton.jit
@no_type_check
def probes_of(low, high):
    """[row, PROBES]: keys from `low` on in equal steps of an eighth of the way to `high`."""
    step = tl.maximum((high.to(tl.uint32) - low.to(tl.uint32)) // PROBES, 1)
    probe = low.to(tl.uint32)[:, None] + step[:, None] * tl.arange(0, PROBES)[None, :].to(tl.uint32)
    return probe.to(tl.int32), step.to(tl.int32)


@triton.jit
@no_type_check
def count_at(probes, keys):
    """[row, PROBES]: how many keys [row, column] reach each probe."""
    return tl.sum((keys[:, None, :] >= probes[:, :, None]).to(tl.int32), axis=2)


@triton.jit
@no_type_check
def narrow(low, high, done, counts, step, topk):
    """The step that holds the topk-th largest; `low` stays at or below it, `high` above."""
    probe = tl.arange(0, PROBES)[None, :]
    passed = tl.sum(((counts >= topk) & (probe > 0)).to(tl.int32), axis=1)
    exact = tl.sum(((counts == topk) & (probe == passed[:, None])).to(tl.int32), axis=1) > 0
    new_low = low + step * passed
    new_high = tl.where(passed == PROBES - 1, high, tl.minimum(new_low + step, high))
    low, high = tl.where(done, low, new_low), tl.where(done, high, new_high)
    return low, high, done | exact | (low + 1 >= high)
