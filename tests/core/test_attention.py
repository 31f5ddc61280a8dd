"""SR-attention: the reference against loops, every path against the reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cytossl_core.attention import irpe_buckets, pairs, sr_attention
from cytossl_core.attention.cpu import pairs_attention
from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import reference_attention
from cytossl_core.attention.sparse import sparse_attention
from tests.conftest import TOLERANCE
from tests.definitions import attention as definition

PATHS = [sparse_attention, pairs_attention]
GRIDS = {1: (0, 0), 2: (1, 1), 3: (1, 2), 37: (6, 6), 50: (7, 7), 101: (4, 25), 300: (13, 23)}


def problem(
    token, topk, heads=(1, 3, 3), dtype=torch.float64, batch=2, dim=5, seed=0, bias=None, ratio=1.9
):
    """Inputs of a grid that makes `token` tokens, with tables of 1 or 3 heads or None."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    height, width = GRIDS.get(token, (1, token - 1))
    special = token - height * width
    ids, count = irpe_buckets(max(height, 1), max(width, 1), ratio=ratio, special_tokens=special)
    query, key, value = (draw(batch, 3, token, dim) for _ in range(3))
    table_q, table_k, table_v = (draw(h, count, dim) if h else None for h in heads)
    ids = ids[:token, :token].contiguous()
    scale = dim**-0.5
    return Inputs(query, key, value, topk, ids, table_q, table_k, table_v, scale, bias, 0.0)


def run(path, x):
    """Output, and gradients of query, key, value and tables for one random output gradient."""
    tensors = [x.query, x.key, x.value, *x.tables.values()]
    out = path(x.in_float32()).to(x.query.dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, tensors, grad)]


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        error = (a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt()
        assert error <= tolerance or torch.equal(a, b), (tuple(a.shape), float(error))


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization"])
@pytest.mark.parametrize("topk", [1, 3, 10, 11, 12, None])
def test_reference_matches_loops_over_the_equations(method, topk):
    ids, count = irpe_buckets(3, 3, method=method, special_tokens=2)
    random = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 2, 3, 11, 7, generator=random, dtype=torch.float64)
    tables = torch.randn(3, 3, count, 7, generator=random, dtype=torch.float64)
    arguments = dict(zip(("table_q", "table_k", "table_v"), tables, strict=True))
    out = sr_attention(
        query, key, value, topk=topk, buckets=ids, **arguments, scale=0.3, backend="reference"
    )
    for b in range(2):
        for h in range(3):
            one = [t[b, h].tolist() for t in (query, key, value)]
            r = [t[h].tolist() for t in tables]
            expected, _ = definition.attention(*one, topk, ids.tolist(), *r, scale=0.3)
            torch.testing.assert_close(out[b, h], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_three_tokens_by_hand(backend):
    """Scores are logarithms, so that weights are whole parts of a whole."""
    two, three = math.log(2), math.log(3)
    query, key, value = torch.tensor(
        [[1.0, 1.0, 1.0], [two, three, 0.0], [10.0, 20.0, 60.0]], dtype=torch.float64
    ).view(3, 1, 1, 3, 1)
    ids, count = irpe_buckets(1, 3, special_tokens=0)
    own, right = 24, 25  # buckets of offset 0, and of query one column right of key

    def attend(topk, **tables):
        made = {}
        for name, (bucket, number) in tables.items():
            made[name] = torch.zeros(1, count, 1, dtype=torch.float64)
            made[name][0, bucket] = number
        arguments = {"buckets": ids, "scale": 1.0, "backend": backend}
        out = sr_attention(query, key, value, topk=topk, **arguments, **made)
        return out.flatten().tolist()

    # parts 2, 3, 1 of 6; then the 1 is dropped
    assert attend(None) == pytest.approx([140 / 6] * 3)
    assert attend(2) == pytest.approx([(2 * 10 + 3 * 20) / 5] * 3)
    # r^K doubles the part of the own key: 4 3 1, 2 6 1, 2 3 2 where two are tied at second;
    # r^V adds 5 to the own value
    assert attend(2, table_k=(own, two), table_v=(own, 5.0)) == pytest.approx(
        [(4 * 15 + 3 * 20) / 7, (2 * 10 + 6 * 25) / 8, (2 * 10 + 3 * 20 + 2 * 65) / 7]
    )
    # r^Q is read at [key, query]: key j adds its own number again for the query to its left
    assert attend(2, table_q=(right, 1.0)) == pytest.approx(
        [(2 * 10 + 9 * 20) / 11, (2 * 10 + 3 * 20) / 5, (2 * 10 + 3 * 20) / 5]
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [1, 2, 3, 17, 37, 50, 101, 300])
def test_path_matches_reference_with_all_gradients(path, token):
    for topk in {1, 15, 16, 17, token, token + 5}:
        if path is pairs_attention and topk > token:
            continue
        x = problem(token, topk)
        assert_same(run(path, x), run(reference_attention, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "heads", [(0, 0, 0), (0, 1, 0), (0, 3, 0), (3, 1, 0), (1, 1, 1), (3, 3, 3), (0, 0, 3)]
)
def test_path_matches_reference_with_any_tables(path, heads):
    x = problem(37, 7, heads)
    assert_same(run(path, x), run(reference_attention, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_path_matches_reference_in_lower_precision(path, dtype):
    x = problem(37, 16, dtype=dtype)
    assert_same(run(path, x), run(reference_attention, x), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
def test_path_matches_reference_with_padded_keys(path):
    padded = torch.zeros(2, 1, 1, 37, dtype=torch.float64)
    padded[0, ..., 30:], padded[1, ..., 11:] = -torch.inf, -torch.inf  # 11 keys, fewer than h
    x = problem(37, 16, bias=padded)
    assert_same(run(path, x), run(reference_attention, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("path", PATHS)
def test_work_in_parts_changes_no_bit(path, monkeypatch):
    whole = run(path, problem(37, 7))
    for chunk in (1, 37 * 37 * 2, 37 * 37 * 4):
        monkeypatch.setattr(pairs, "CHUNK", chunk)
        parts = run(path, problem(37, 7))
        assert_same(parts, whole, 1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck_away_from_ties(path):
    x = problem(11, 4, batch=1, dim=3)
    tensors = [x.query, x.key, x.value, x.table_q, x.table_k, x.table_v]

    def function(*t):
        return path(Inputs(*t[:3], x.topk, x.buckets, *t[3:], x.scale, None, 0.0))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_can_be_differentiated_again(path):
    seconds = []
    for each in (reference_attention, path):
        x = problem(37, 4)
        tensors = [x.query, x.value, *x.tables.values()]
        same = replace(x, key=x.query)  # one tensor in two places
        first = torch.autograd.grad(each(same).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(t.square().sum() for t in first), tensors))
    assert_same(seconds[1], seconds[0], TOLERANCE[torch.float64])


@pytest.mark.parametrize("path", PATHS)
def test_same_inputs_give_the_same_bits(path):
    first, second = (run(path, problem(101, 16, dtype=torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BACKENDS = st.sampled_from(["reference", "torch"])
SIZES = st.integers(1, 40)


@settings(max_examples=25, deadline=None)
@given(BACKENDS, SIZES, SIZES, st.integers(0, 99))
def test_permuting_keys_permutes_nothing_but_order(backend, token, topk, seed):
    x = problem(token, topk, (0, 0, 0), seed=seed)
    order = torch.randperm(token, generator=torch.Generator().manual_seed(seed))
    out = sr_attention(x.query, x.key, x.value, topk=topk, backend=backend)
    moved = (x.query, x.key[:, :, order], x.value[:, :, order])
    torch.testing.assert_close(sr_attention(*moved, topk=topk, backend=backend), out)
    moved = [t[:, :, order] for t in (x.query, x.key, x.value)]
    out = out[:, :, order]
    torch.testing.assert_close(sr_attention(*moved, topk=topk, backend=backend), out)


@settings(max_examples=25, deadline=None)
@given(BACKENDS, SIZES, SIZES, st.integers(-8, 8))
def test_adding_a_constant_to_all_scores_changes_nothing(backend, token, topk, constant):
    x = problem(token, topk)
    arguments = {"topk": topk, "buckets": x.buckets, "backend": backend, **x.tables}
    out = sr_attention(x.query, x.key, x.value, **arguments)
    bias = torch.full((1, 1, 1, 1), float(constant), dtype=torch.float64)
    shifted = sr_attention(x.query, x.key, x.value, bias=bias, **arguments)
    torch.testing.assert_close(shifted, out)


@settings(max_examples=20, deadline=None)
@given(BACKENDS, SIZES, st.integers(0, 9))
def test_topk_of_all_tokens_is_dense(backend, token, more):
    x = problem(token, None)
    arguments = {"buckets": x.buckets, "backend": backend, **x.tables}
    dense = sr_attention(x.query, x.key, x.value, **arguments)
    full = sr_attention(x.query, x.key, x.value, topk=token + more, **arguments)
    torch.testing.assert_close(full, dense)


@settings(max_examples=20, deadline=None)
@given(BACKENDS, SIZES, SIZES)
def test_tables_of_zeros_equal_no_tables(backend, token, topk):
    x = problem(token, topk)
    zeros = {name: torch.zeros_like(table) for name, table in x.tables.items()}
    arguments = {"topk": topk, "backend": backend}
    plain = sr_attention(x.query, x.key, x.value, **arguments)
    with_tables = sr_attention(x.query, x.key, x.value, buckets=x.buckets, **zeros, **arguments)
    torch.testing.assert_close(with_tables, plain)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dense_equals_torch(backend):
    x = problem(50, None, (0, 0, 0))
    out = sr_attention(x.query, x.key, x.value, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(x.query, x.key, x.value))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_empty_batch_stays_empty(backend):
    query = torch.zeros(0, 3, 50, 5, requires_grad=True)
    out = sr_attention(query, query, query, topk=16, backend=backend)
    out.sum().backward()
    assert out.shape == query.grad.shape == (0, 3, 50, 5)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("path", PATHS)
def test_makes_no_temporary_larger_than_the_scores(path):
    x = problem(101, 7, dtype=torch.float32, dim=64, batch=1)
    with Largest() as largest:
        run(path, x)
    assert largest.elements <= 3 * 101 * 101


def test_selects_in_float32_under_autocast():
    """bfloat16 would round these scores to ties and keep more than one."""
    query = torch.ones(1, 1, 4, 1)
    key = torch.tensor([1.0, 1.001, 1.002, 1.003]).view(1, 1, 4, 1)
    value = torch.arange(4.0).view(1, 1, 4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sr_attention(query, key, value, topk=1, scale=1.0)
    assert out.flatten().tolist() == [3.0] * 4
