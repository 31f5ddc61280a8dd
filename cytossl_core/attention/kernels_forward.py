"""Triton kernels, forward: one for rows of scores that fit a program, one for longer ones."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

from cytossl_core.attention.kernels import (
    load_rows,
    load_table,
    of_columns,
    of_rows,
    product,
    score_tile,
    store_kept,
    store_rows,
    table_product,
)
from cytossl_core.attention.kernels_buckets import bucket_sums
from cytossl_core.attention.kernels_select import (
    LOWEST,
    PADDING,
    PROBES,
    any_of,
    bisected,
    count_at,
    count_nan,
    from_top,
    join_tops,
    narrow,
    ordered,
    probes_of,
    scores_of,
)


@triton.jit
@no_type_check
def key_tile(
    q, of_query, table_q, key, bias, ids, ids_t, rows, start, k_token, bias_row, bias_column,
    scale, token, dim, count, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keys of selection [query, BLOCK_N], int32, of a tile of columns."""
    columns = start + tl.arange(0, BLOCK_N)
    k = load_rows(key, columns, k_token, token, dim, BLOCK_D)
    of_key = None
    if table_q is not None:
        of_key = of_columns(k, load_table(table_q, 0, 0, count, dim, BLOCK_C, BLOCK_D))
    scores = score_tile(
        q, k, of_query, of_key, bias, ids, ids_t, rows, columns, scale, token, width,
        bias_row, bias_column,
    )  # fmt: skip
    return ordered(scores, columns, token)


@triton.jit
@no_type_check
def weigh(
    keys, low, largest, acc, total, sums, value, kept, order, last, rows, start, v_token,
    token, dim, width, words, HAS_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds a tile of kept weights, and writes which were kept."""
    keep = (rows[:, None] < token) & (keys >= low[:, None])
    store_kept(kept, keep, rows, start, token, words, BLOCK_M, BLOCK_N)
    power = tl.where(keep, tl.exp(scores_of(keys) - largest[:, None]), 0.0)
    v = load_rows(value, start + tl.arange(0, BLOCK_N), v_token, token, dim, BLOCK_D)
    acc += product(power.to(v.dtype), v)
    if HAS_V:
        sums += bucket_sums(power, order, last, rows, start, token, width, BLOCK_N, BLOCK_C)
    return acc, total + tl.sum(power, axis=1), sums


@triton.jit
@no_type_check
def finish(
    acc, total, largest, sums, q, table_v, head, v_table, rows, out, lse, stride, token, dim,
    count, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds r^V, divides by the sums of weights and writes a block of queries' results."""
    if table_v is not None:
        t_v = load_table(table_v, head, v_table, count, dim, BLOCK_C, BLOCK_D)
        acc += table_product(sums, t_v, q)
    divisor = tl.where(total == 0, 1.0, total)  # a row without keys gives zeros
    store_rows(out, rows, stride, acc / divisor[:, None], token, dim, BLOCK_D)
    tl.store(lse + rows, largest + tl.log(divisor), mask=rows < token)


@triton.jit
@no_type_check
def forward(
    query, key, value, table_k, table_q, table_v, bias, ids, ids_t, order, last, out, lse, kept,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_row, bias_column, k_table, q_table, v_table,
    scale, heads, token, dim, count, words, width, topk,
    WHOLE: tl.constexpr, SORTED: tl.constexpr, DENSE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys, tile by tile.

    WHOLE: the TILES of scores stay in registers, and are computed once. Else they are computed
    again in each pass: two with SORTED, at most 13 without. Sizes: words = ceil(token / 32),
    width = token rounded up to tiles; strides are in elements.
    """
    blocks = tl.cdiv(token, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = item // heads, item % heads
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(query + batch * q_batch + head * q_head, rows, q_token, token, dim, BLOCK_D)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    kept += item * token * words
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    of_query = None
    if table_k is not None:
        of_query = of_rows(q, load_table(table_k, head, k_table, count, dim, BLOCK_C, BLOCK_D))
    if table_q is not None:
        table_q += head * q_table

    high = tl.full([BLOCK_M], LOWEST, tl.int32)
    low = tl.full([BLOCK_M], LOWEST, tl.int32)
    nans = tl.zeros([BLOCK_M], tl.int32)
    tops = tl.full([BLOCK_M, BLOCK_H], PADDING, tl.int32)
    tiles = ()
    if WHOLE:
        for t in tl.static_range(TILES):
            keys = key_tile(
                q, of_query, table_q, key, bias, ids, ids_t, rows, t * BLOCK_N, k_token,
                bias_row, bias_column, scale, token, dim, count, width, BLOCK_N, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            high = tl.maximum(high, tl.max(keys, axis=1))
            nans += count_nan(keys)
            if SORTED:
                tops = join_tops(tops, keys, BLOCK_H)
            tiles = tiles + (keys,)  # noqa: RUF005  Triton adds tuples, and does not unpack them
        if not DENSE and not SORTED:
            low = bisected(tiles, high + 1, rows, token, topk, TILES, BLOCK_M)
    else:
        for start in range(0, token, BLOCK_N):
            keys = key_tile(
                q, of_query, table_q, key, bias, ids, ids_t, rows, start, k_token,
                bias_row, bias_column, scale, token, dim, count, width, BLOCK_N, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            high = tl.maximum(high, tl.max(keys, axis=1))
            nans += count_nan(keys)
            if SORTED:
                tops = join_tops(tops, keys, BLOCK_H)
        if not DENSE and not SORTED:
            top = high + 1
            done = (rows >= token) | (low + 1 >= top)
            while any_of(~done):
                probes, step = probes_of(low, top)
                counts = tl.zeros([BLOCK_M, PROBES], tl.int32)
                for start in range(0, token, BLOCK_N):
                    keys = key_tile(
                        q, of_query, table_q, key, bias, ids, ids_t, rows, start, k_token,
                        bias_row, bias_column, scale, token, dim, count, width,
                        BLOCK_N, BLOCK_D, BLOCK_C,
                    )  # fmt: skip
                    counts += count_at(probes, keys)
                low, top, done = narrow(low, top, done, counts, step, topk)
    if SORTED:
        low = from_top(tops, topk, BLOCK_H)
    low = tl.where(nans >= topk, LOWEST, low)

    largest = scores_of(high)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if WHOLE:
        for t in tl.static_range(TILES):
            acc, total, sums = weigh(
                tiles[t], low, largest, acc, total, sums, value, kept, order, last, rows,
                t * BLOCK_N, v_token, token, dim, width, words, table_v is not None,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_C,
            )  # fmt: skip
    else:
        for start in range(0, token, BLOCK_N):
            keys = key_tile(
                q, of_query, table_q, key, bias, ids, ids_t, rows, start, k_token,
                bias_row, bias_column, scale, token, dim, count, width, BLOCK_N, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            acc, total, sums = weigh(
                keys, low, largest, acc, total, sums, value, kept, order, last, rows,
                start, v_token, token, dim, width, words, table_v is not None,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_C,
            )  # fmt: skip
    finish(
        acc, total, largest, sums, q, table_v, head, v_table, rows,
        out + (batch * token * heads + head) * dim, lse + item * token, heads * dim,
        token, dim, count, BLOCK_D, BLOCK_C,
    )  # fmt: skip
