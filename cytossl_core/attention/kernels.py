"""What all Triton kernels of SR-attention share: loads, products, scores, bits of kept pairs."""

# ruff: noqa: N803  constants of a kernel are upper case, as in Triton's own code

from typing import no_type_check  # shape checks of the tests must not wrap what Triton parses

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def product(a, b, PRECISION: tl.constexpr = "tf32x3"):
    """[i, k] x [k, j] in float32; float32 factors keep some 21 bits, on the tensor cores.

    The interpreter would multiply the bit patterns of bfloat16.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
@no_type_check
def parts_of(table, rows):
    """A table as the sum of two in the dtype of the rows it meets: float32 keeps 16 bits or more.

    A float32 table would lose what selection compares if it were rounded to half precision.
    """
    high = table.to(rows.dtype)
    return high, (table.to(tl.float32) - high.to(tl.float32)).to(rows.dtype)


@triton.jit
@no_type_check
def of_rows(rows, table):
    """[row, bucket], float32: each row's products with a table [bucket, dim]."""
    high, low = parts_of(table, rows)
    made = product(rows, tl.trans(high))
    if table.dtype != rows.dtype and rows.dtype != tl.float32:
        made += product(rows, tl.trans(low))
    return made


@triton.jit
@no_type_check
def of_columns(rows, table):
    """[bucket, row], float32: the same, transposed."""
    high, low = parts_of(table, rows)
    made = product(high, tl.trans(rows))
    if table.dtype != rows.dtype and rows.dtype != tl.float32:
        made += product(low, tl.trans(rows))
    return made


@triton.jit
@no_type_check
def table_product(a, b, like):
    """[i, k] x [k, j] where float32 sums of buckets meet rows: tf32 if the rows have no more."""
    if like.dtype == tl.float32:
        return product(a, b.to(tl.float32))
    return product(a.to(tl.float32), b.to(tl.float32), "tf32")


@triton.jit
@no_type_check
def gradient_product(a, b):
    """Float32 [i, k] x [k, j]; float16 is met with every row of `a` scaled to about 1.

    Gradients of scores are often below 6e-8, where float16 ends. Powers of two round nothing.
    """
    if b.dtype != tl.float16:
        return product(a.to(b.dtype), b)
    bits = tl.max(tl.abs(a), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(bits, 0x7E800000)
    down = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    up = bits.to(tl.float32, bitcast=True)
    return product((a * down[:, None]).to(b.dtype), b) * up[:, None]


@triton.jit
@no_type_check
def load_rows(start, rows, stride, token, dim, BLOCK_D: tl.constexpr):
    """A block of rows of [token, dim], zeros outside."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < token) & (column[None, :] < dim)
    return tl.load(start + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_rows(start, rows, stride, values, token, dim, BLOCK_D: tl.constexpr):
    """Writes a block of rows of [token, dim]."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < token) & (column[None, :] < dim)
    tl.store(start + rows[:, None] * stride + column[None, :], values, mask=inside)


@triton.jit
@no_type_check
def load_table(table, head, stride, count, dim, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The table of a head, [bucket, dim], zeros outside: ids outside the table read zeros."""
    return load_rows(table + head * stride, tl.arange(0, BLOCK_C), dim, count, dim, BLOCK_D)


@triton.jit
@no_type_check
def load_ids(ids, rows, columns, token, width):
    """Bucket ids of a tile of [token, width], int32; columns are always inside."""
    place = ids + rows[:, None] * width + columns[None, :]
    return tl.load(place, mask=rows[:, None] < token, other=0).to(tl.int32)


@triton.jit
@no_type_check
def score_tile(
    q, k, of_query, of_key, bias, ids, ids_t, rows, columns, scale, token, width,
    bias_row, bias_column,
):  # fmt: skip
    """Equation 8 for a tile [query, key], in float32.

    of_query [query, bucket] is q r^K and of_key [bucket, key] is k r^Q, or None.
    """
    scores = product(q, tl.trans(k)) * scale
    if of_query is not None:
        bucket = load_ids(ids, rows, columns, token, width)
        scores += tl.gather(of_query, bucket, axis=1) * scale
    if of_key is not None:
        bucket = load_ids(ids_t, rows, columns, token, width)
        scores += tl.gather(of_key, bucket, axis=0) * scale
    if bias is not None:
        rows, columns = rows[:, None], columns[None, :]
        place = bias + rows * bias_row + columns * bias_column
        inside = (rows < token) & (columns < token)
        scores += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return scores


@triton.jit
@no_type_check
def store_kept(kept, keep, rows, start, token, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes the flags of a tile that starts at column `start`: 32 to a word, first one lowest."""
    word = start // 32 + tl.arange(0, BLOCK_N // 32)
    bits = tl.reshape(keep.to(tl.int32), [BLOCK_M, BLOCK_N // 32, 32])
    packed = tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)
    inside = (rows[:, None] < token) & (word[None, :] < words)
    tl.store(kept + rows[:, None] * words + word[None, :], packed, mask=inside)


@triton.jit
@no_type_check
def load_kept(kept, rows, columns, token, words):
    """Reads the flags of a tile."""
    inside = (rows[:, None] < token) & (columns[None, :] < token)
    place = kept + rows[:, None] * words + columns[None, :] // 32
    word = tl.load(place, mask=inside, other=0)
    return ((word >> (columns[None, :] % 32)) & 1) == 1
