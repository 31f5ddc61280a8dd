"""Sums of a tile's values by bucket: one pass over the values, however many buckets there are."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

from cytossl_core.attention.kernels import INTERPRETED


@triton.jit
@no_type_check
def add_in_run(sum_a, first_a, sum_b, first_b):
    """Joins two neighbouring stretches: sums start anew at the first of a run."""
    return tl.where(first_b != 0, sum_b, sum_a + sum_b), first_a | first_b


@triton.jit
@no_type_check
def running_sums(values, first, BLOCK: tl.constexpr):
    """Sums along axis 1 from the latest `first` on; same tree each time, so same bits."""
    if not INTERPRETED:
        return tl.associative_scan((values, first), 1, add_in_run)[0]
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], values.shape)
    step = 1  # the interpreter scans value by value: the same by doubling steps
    while step < BLOCK:
        before = tl.maximum(column - step, 0)
        sum_a, first_a = tl.gather(values, before, 1), tl.gather(first, before, 1)
        joined, any_first = add_in_run(sum_a, first_a, values, first)
        values = tl.where(column >= step, joined, values)
        first = tl.where(column >= step, any_first, first)
        step *= 2
    return values


@triton.jit
@no_type_check
def bucket_sums(
    values, order, last, rows, start, token, width, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """[row, bucket], float32: the values [row, BLOCK] of each bucket summed.

    order [token, width], uint8: the tile's columns by bucket; the top bit starts a bucket.
    last [token, width // BLOCK, BLOCK_C], int8: where in that order a bucket ends, or -1.
    """
    packed = load_tile(order, rows, width, start, token, BLOCK)
    column, first = packed & 127, packed >> 7
    sums = running_sums(tl.gather(values, column, axis=1), first, BLOCK)
    ends = load_tile(last, rows, width // BLOCK * BLOCK_C, start // BLOCK * BLOCK_C, token, BLOCK_C)
    found = tl.gather(sums, tl.maximum(ends, 0), axis=1)
    return tl.where(ends >= 0, found, 0.0)


@triton.jit
@no_type_check
def load_tile(table, rows, stride, start, token, BLOCK: tl.constexpr):
    """A tile of a table of small numbers, int32."""
    place = table + rows[:, None] * stride + start + tl.arange(0, BLOCK)[None, :]
    return tl.load(place, mask=rows[:, None] < token, other=0).to(tl.int32)
