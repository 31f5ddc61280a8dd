"""Kernels around single functions of the kernels, for tests."""

import triton
import triton.language as tl

from cytossl_core.attention.kernels_buckets import add_in_run, running_sums
from cytossl_core.attention.kernels_select import ordered


@triton.jit
def write_keys(scores, keys):
    """Keys of selection of 32 scores."""
    column = tl.arange(0, 32)
    tl.store(keys + column[None, :], ordered(tl.load(scores + column[None, :]), column, 32))


@triton.jit
def write_running(values, first, found):
    """Running sums of [16, 16], by the function and by the scan that GPUs take."""
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    value, start = tl.load(values + place), tl.load(first + place)
    tl.store(found + place, running_sums(value, start, 16))
    scanned, _ = tl.associative_scan((value, start), 1, add_in_run)
    tl.store(found + 256 + place, scanned)
