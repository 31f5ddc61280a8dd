"""SR-attention at the edges: ties, zeros, removed keys, NaN, and when pairs give way."""

import math
from dataclasses import replace

import pytest
import torch

from cytossl_core.attention import cpu, pairs, reference, sparse
from cytossl_core.attention.cpu import pairs_attention
from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import dropped, reference_attention, sr_scores
from tests.conftest import TOLERANCE
from tests.core.test_attention import PATHS, assert_same, problem, run


def kept(path, scores, topk):
    """Which keys a path keeps for given scores, seen through values that are a unit matrix."""
    token = scores.shape[-1]
    zero = torch.zeros(1, 1, token, token, dtype=scores.dtype)
    eye = torch.eye(token, dtype=scores.dtype)[None, None]
    x = Inputs(zero, zero, eye, topk, None, None, None, None, 1.0, scores[None, None], 0.0)
    return path(x)[0, 0] > 0


@pytest.mark.parametrize("path", [reference_attention, *PATHS])
@pytest.mark.parametrize("topk", [1, 16, 17, 150])
def test_ties_with_the_last_kept_stay(path, topk):
    scores = torch.randint(-2, 3, (211, 211), generator=torch.Generator().manual_seed(3)).double()
    expected = torch.stack([row >= row.sort(descending=True).values[topk - 1] for row in scores])
    assert expected.sum() > 211 * topk + 1000  # thousands of ties
    assert torch.equal(kept(path, scores, topk), expected)


@pytest.mark.parametrize("path", [reference_attention, *PATHS])
def test_both_zeros_are_equal(path, monkeypatch):
    """The scores are put in: a sum of products begins at 0.0, which swallows -0.0."""
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0]).expand(5, 5).contiguous()
    for module, name in ((reference, "sr_scores"), (sparse, "table_scores")):
        monkeypatch.setattr(module, name, lambda x: x.bias.clone())
    monkeypatch.setattr(pairs, "table_scores", lambda x: x.bias.clone())
    assert scores[0].signbit().tolist() == [False, True, False, True, True]
    for topk in (1, 2):
        assert kept(path, scores, topk).sum(dim=1).tolist() == [4] * 5


@pytest.mark.parametrize("path", [reference_attention, *PATHS])
def test_a_row_without_keys_gives_zeros_and_no_gradient(path):
    bias = torch.zeros(2, 1, 37, 37, dtype=torch.float64)
    bias[0, :, 5] = -torch.inf
    x = problem(37, 7, bias=bias)
    out = path(x)
    assert torch.equal(out[0, :, 5], torch.zeros(3, 5, dtype=torch.float64))
    for grad in torch.autograd.grad(out[0, :, 5].sum(), [x.query, x.key, x.value]):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("topk", [1, 4, 16])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["query", "key", "value", "table_q", "table_k", "table_v", "bias", "grad"]
)
def test_one_nan_or_infinity_is_never_dropped(path, topk, poison, name):
    """Neither from the output nor from a gradient: all that the reference has, and no less."""
    if name == "bias" and poison == -math.inf:
        return  # a removed key
    bias = torch.zeros(2, 1, 37, 37, dtype=torch.float64) if name == "bias" else None
    x = problem(37, topk, bias=bias)
    grad = torch.randn(x.query.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        tensor = grad if name == "grad" else getattr(x, name)
        tensor[(0, 24, 2) if tensor.ndim == 3 else (0, 0, 7, 2)] = poison
    tensors = [x.query, x.key, x.value, *x.tables.values()]
    results = []
    for each in (reference_attention, path):
        out = each(x)
        gradients = torch.autograd.grad(out, tensors, grad)
        results.append([t.isfinite() for t in (out, *gradients)])
    expected, found = results
    assert not all(t.all() for t in expected)
    for wanted, seen in zip(expected, found, strict=True):
        assert not (seen & ~wanted).any()


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_reaches_no_other_head(path):
    x = problem(37, 4)
    with torch.no_grad():
        x.value[0, 1, 7, 2] = math.nan
    assert torch.equal(path(x).isnan(), reference_attention(x).isnan())


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_tied_scores_match_the_reference(path):
    """Whole numbers tie with the last kept by the hundred, and their products are exact."""
    x = problem(101, 16)
    with torch.no_grad():
        for tensor in (x.query, x.key, *x.tables.values()):
            tensor.copy_(tensor.round().clamp(-1, 1))
    x = replace(x, scale=0.5)
    assert (~dropped(sr_scores(x), 16)).sum() > 1.2 * 16 * 2 * 3 * 101
    assert_same(run(path, x), run(reference_attention, x), TOLERANCE[torch.float64])


def test_pairs_leave_out_removed_keys():
    padded = torch.zeros(2, 1, 1, 37, dtype=torch.float64)
    padded[..., 11:] = -torch.inf  # 11 keys, fewer than h
    with torch.no_grad():
        chosen, weight = pairs.select(problem(37, 16, bias=padded))
    assert len(weight) == len(chosen.row) == 2 * 3 * 37 * 11


def test_most_pairs_being_tied_leaves_them_to_the_sparse_path(monkeypatch):
    monkeypatch.setattr(cpu, "_PairsAttention", None)
    x = problem(37, 5)
    with torch.no_grad():
        x.query.zero_()
        x.table_q.zero_()
    assert_same(run(pairs_attention, x), run(reference_attention, x), TOLERANCE[torch.float64])


def test_without_numpy_torch_selects_the_same_pairs(monkeypatch):
    x = problem(37, 7)
    expected = run(pairs_attention, x)
    monkeypatch.setattr(pairs, "HAS_NUMPY", False)
    assert all(torch.equal(a, b) for a, b in zip(run(pairs_attention, x), expected, strict=True))
