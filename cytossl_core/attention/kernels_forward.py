"""Triton kernels, forward: one for sequences that fit a tile, one for longer ones."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

from cytossl_core.attention.kernels import (
    LOWEST,
    any_of,
    bisect,
    bucket_sums,
    finish,
    load_ids,
    load_rows,
    middle_of,
    ordered,
    product,
    score_tile,
    store_kept,
)


@triton.jit
@no_type_check
def forward_whole(
    query, key, value, q_table, k_table, bias, ids, out, lse, kept, hist,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_row, bias_column,
    scale, heads, token, dim, count, words, topk,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys at once: scores are computed once, in registers."""
    blocks = tl.cdiv(token, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = item // heads, item % heads
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    q = load_rows(query + batch * q_batch + head * q_head, rows, q_token, token, dim, BLOCK_D)
    k = load_rows(key + batch * k_batch + head * k_head, columns, k_token, token, dim, BLOCK_D)
    scores = score_tile(
        q, k, q_table + item * token * count, k_table + item * token * count,
        bias + batch * bias_batch + head * bias_head, ids, rows, columns, scale, token, count,
        bias_row, bias_column, HAS_K, HAS_Q, HAS_BIAS,
    )  # fmt: skip
    keep = (rows[:, None] < token) & (columns[None, :] < token)
    if not DENSE:
        keys = ordered(scores, columns, token)
        low = tl.full([BLOCK_M], LOWEST, tl.int32)
        high = tl.max(keys, axis=1) + 1
        done = (rows >= token) | (low + 1 >= high)
        while any_of(~done):
            enough = tl.sum((keys >= middle_of(low, high)[:, None]).to(tl.int32), axis=1)
            low, high, done = bisect(low, high, done, enough, topk)
        keep = keep & (keys >= low[:, None])
    store_kept(kept + item * token * words, keep, rows, 0, token, words, BLOCK_M, BLOCK_N)
    largest = tl.max(tl.where(keep, scores, float("-inf")), axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    power = tl.where(keep, tl.exp(scores - largest[:, None]), 0.0)
    v = load_rows(value + batch * v_batch + head * v_head, columns, v_token, token, dim, BLOCK_D)
    acc = product(power.to(v.dtype), v)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if HAS_V:
        bucket = load_ids(ids, rows[:, None], columns[None, :], token)
        sums = bucket_sums(sums, power, bucket, count, 1, BLOCK_C)
    finish(
        acc, tl.sum(power, axis=1), largest, sums, rows, out + item * token * dim,
        lse + item * token, hist + item * token * count, token, dim, count, HAS_V, BLOCK_D, BLOCK_C,
    )  # fmt: skip


@triton.jit
@no_type_check
def forward_tiled(
    query, key, value, q_table, k_table, bias, ids, out, lse, kept, hist,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    bias_batch, bias_head, bias_row, bias_column,
    scale, heads, token, dim, count, words, topk,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of queries against tiles of keys, whose scores are computed again at each step."""
    blocks = tl.cdiv(token, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = item // heads, item % heads
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    query += batch * q_batch + head * q_head
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    bias += batch * bias_batch + head * bias_head
    q_table += item * token * count
    k_table += item * token * count
    q = load_rows(query, rows, q_token, token, dim, BLOCK_D)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    high = tl.full([BLOCK_M], LOWEST, tl.int32)
    for start in range(0, token, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, k_token, token, dim, BLOCK_D)
        scores = score_tile(
            q, k, q_table, k_table, bias, ids, rows, columns, scale, token, count,
            bias_row, bias_column, HAS_K, HAS_Q, HAS_BIAS,
        )  # fmt: skip
        inside = columns[None, :] < token
        largest = tl.maximum(largest, tl.max(tl.where(inside, scores, float("-inf")), axis=1))
        high = tl.maximum(high, tl.max(ordered(scores, columns, token), axis=1))
    low = tl.full([BLOCK_M], LOWEST, tl.int32)
    high += 1
    done = (rows >= token) | (low + 1 >= high) | DENSE
    while any_of(~done):
        enough = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, token, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_rows(key, columns, k_token, token, dim, BLOCK_D)
            scores = score_tile(
                q, k, q_table, k_table, bias, ids, rows, columns, scale, token, count,
                bias_row, bias_column, HAS_K, HAS_Q, HAS_BIAS,
            )  # fmt: skip
            reached = ordered(scores, columns, token) >= middle_of(low, high)[:, None]
            enough += tl.sum(reached.to(tl.int32), axis=1)
        low, high, done = bisect(low, high, done, enough, topk)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, token, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, k_token, token, dim, BLOCK_D)
        scores = score_tile(
            q, k, q_table, k_table, bias, ids, rows, columns, scale, token, count,
            bias_row, bias_column, HAS_K, HAS_Q, HAS_BIAS,
        )  # fmt: skip
        keep = (rows[:, None] < token) & (ordered(scores, columns, token) >= low[:, None])
        store_kept(kept + item * token * words, keep, rows, start, token, words, BLOCK_M, BLOCK_N)
        power = tl.where(keep, tl.exp(scores - largest[:, None]), 0.0)
        total += tl.sum(power, axis=1)
        v = load_rows(value, columns, v_token, token, dim, BLOCK_D)
        acc += product(power.to(v.dtype), v)
        if HAS_V:
            bucket = load_ids(ids, rows[:, None], columns[None, :], token)
            sums = bucket_sums(sums, power, bucket, count, 1, BLOCK_C)
    finish(
        acc, total, largest, sums, rows, out + item * token * dim, lse + item * token,
        hist + item * token * count, token, dim, count, HAS_V, BLOCK_D, BLOCK_C,
    )  # fmt: skip
