"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cytossl_core.attention import fused
from cytossl_core.attention.fused import fused_attention
from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import reference_attention
from tests.conftest import TOLERANCE
from tests.core.fused_cases import INTERPRETED, ROOT, on, problem, run_fused
from tests.core.test_attention import assert_same, run
from tests.core.test_attention import problem as any_problem

if fused.UNUSABLE is None:
    from cytossl_core.attention import launch
    from tests.core.kernels import write_keys

FILES = (__file__, __file__.replace(".py", "_memory.py"))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "no CUDA device: test_kernels" not in done.stdout


@pytest.mark.parametrize(
    ("token", "topk", "heads", "dtype"),
    [
        (3, 2, (1, 1, 1), torch.float32),
        (17, None, (3, 1, 3), torch.float32),
        (37, 15, (1, 3, 3), torch.float32),
        (37, 16, (0, 0, 0), torch.float32),
        (37, 17, (1, 1, 1), torch.float16),
        (37, 16, (3, 3, 3), torch.bfloat16),
    ],
)
def test_fused_matches_reference_with_all_gradients(device, token, topk, heads, dtype):
    x = problem(token, topk, heads, dtype, batch=1)
    expected = [t.to(device) for t in run(reference_attention, x)]
    assert_same(run_fused(on(device, x)), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("topk", "heads"), [(2, (1, 3, 1)), (65, (0, 1, 0)), (None, (0, 0, 0))])
def test_tiled_kernel_matches_reference_with_all_gradients(device, tiled, topk, heads):
    x = problem(67, topk, heads, torch.float32, batch=1)
    expected = [t.to(device) for t in run(reference_attention, x)]
    assert_same(run_fused(on(device, x)), expected, TOLERANCE[torch.float32])


def test_sorted_tops_select_what_bisection_selects(device, monkeypatch):
    x = on(device, problem(17, 15, (1, 0, 0), torch.float32, batch=1))
    with torch.no_grad():
        x.query.round_(), x.key.round_()  # ties
        found = fused_attention(x)
        monkeypatch.setattr(launch, "SORTED", True)
        launch._fitting.clear()
        assert torch.equal(fused_attention(x), found)
    launch._fitting.clear()


@pytest.mark.parametrize("dim", [63, 64])
def test_default_buckets_and_odd_widths(device, dim):
    x = any_problem(17, 5, (1, 3, 1), torch.float32, batch=1, dim=dim)
    assert x.table_k.shape[1] == 50
    expected = [t.to(device) for t in run(reference_attention, x)]
    assert_same(run_fused(on(device, x)), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_as_its_digits_allow(device, dtype):
    """Against float64 of the same inputs, float32 tables as under autocast, small gradients.

    Inputs are whole parts of a small number, so that all ways select the same.
    """
    x = problem(37, 16, (1, 1, 1), torch.float32, batch=1, dim=64)
    with torch.no_grad():
        for t in (x.query, x.key, x.value, *x.tables.values()):
            t.copy_((t * 4).round() / 4)
        half = {
            name: getattr(x, name).to(dtype).requires_grad_() for name in ("query", "key", "value")
        }
    half = on(device, replace(x, **half))
    double = {name: t.detach().double().requires_grad_() for name, t in vars(x).items()
              if isinstance(t, torch.Tensor) and t.is_floating_point()}  # fmt: skip
    grad = 1e-5 * torch.randn(x.query.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for path, y in ((fused_attention, half), (reference_attention, replace(x, **double))):
        out = path(y)
        leaves = [y.query, y.key, y.value, *y.tables.values()]
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out))])
    found, expected = results
    assert found[0].dtype == found[1].dtype == dtype
    assert found[-1].dtype == torch.float32
    # each result meets rounding to half precision at four places: weights, out, d_score, itself;
    # float16 steps by 6e-8 near zero, which is most of a gradient of 1e-5
    step = 6e-8 / 3e-6 / 12**0.5 if dtype == torch.float16 else 0
    bound = 2 * torch.finfo(dtype).eps + step
    for a, b in zip(found, expected, strict=True):
        error = (a.cpu().double() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < bound, (tuple(a.shape), float(error), bound)


@pytest.mark.parametrize("long", [False, True])
def test_padded_keys_and_rows_without_keys(device, request, long):
    token = 17 if long else 37
    if long:
        request.getfixturevalue("tiled")
    bias = torch.zeros(1, 1, token, token)
    bias[..., 11:] = -torch.inf  # fewer keys than h
    bias[..., 5, :] = -torch.inf
    x = problem(token, 16, (0, 0, 0), torch.float32, batch=1, bias=bias)
    expected = [t.to(device) for t in run(reference_attention, x)]
    found = run_fused(on(device, x))
    assert_same(found, expected, TOLERANCE[torch.float32])
    assert torch.equal(found[0][0, :, 5], torch.zeros_like(found[0][0, :, 5]))


@pytest.mark.parametrize(
    ("token", "topk", "long"),
    [
        (37, 1, False),
        (67, 16, False),
        (67, 17, False),
        (37, 1, True),
        (67, 16, True),
        (67, 65, True),
    ],
)
def test_keeps_ties_and_equal_zeros_exactly(device, request, token, topk, long):
    """Scores are products of one element, among them -0.0: no sum has made it 0.0."""
    if long:
        request.getfixturevalue("tiled")
    random = torch.Generator().manual_seed(3)
    query = torch.tensor([1.0, -1.0]).repeat(token)[:token, None]
    key = torch.randint(-2, 3, (token, 1), generator=random).float()
    key = torch.where((key == 0) & (torch.arange(token)[:, None] % 2 == 0), -0.0, key)
    scores = query @ key.T
    eye = torch.eye(token)[None, None]
    wide = [F.pad(t, (0, token - 1))[None, None] for t in (query, key)]
    x = Inputs(*wide, eye, topk, None, None, None, None, -1.0, None, 0.0)
    kept = -scores >= (-scores).sort(dim=1, descending=True).values[:, topk - 1, None]
    assert torch.equal(fused_attention(on(device, x))[0, 0].cpu() > 0, kept)


def test_selection_takes_both_zeros_for_one(device):
    kinds = torch.tensor([0.0, -0.0, 1.0, -1.0]).repeat(8)[None].to(device)
    assert (kinds.view(torch.int32) == -(2**31)).any()
    keys = torch.zeros(1, 32, dtype=torch.int32, device=device)
    write_keys[(1,)](kinds, keys)
    assert keys[0, 0] == keys[0, 1] == 0
    assert keys[0, 3] < 0 < keys[0, 2]


@pytest.mark.parametrize("heads", [(1, 1, 1), (0, 0, 0)])
def test_gradients_with_ties_match(device, heads):
    x = problem(37, 7, heads, torch.float32, batch=1)
    with torch.no_grad():
        for t in (x.query, x.key, *x.tables.values()):
            t.copy_(t.round())
    x = replace(x, scale=0.5)
    expected = [t.to(device) for t in run(reference_attention, x)]
    assert_same(run_fused(on(device, x)), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("count", [2, 3, 9])  # fewer than h, h, and more
def test_nan_in_a_row_keeps_what_the_reference_keeps(device, count):
    bias = torch.zeros(1, 1, 17, 17)
    bias[..., 5, :count] = torch.nan
    x = problem(17, 3, (1, 0, 1), torch.float32, batch=1, bias=bias)
    expected, found = run(reference_attention, x), run_fused(on(device, x))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan().cpu(), b.isnan())
        torch.testing.assert_close(a.nan_to_num().cpu(), b.nan_to_num())


@pytest.mark.parametrize("name", ["query", "key", "value", "table_k"])
def test_nan_is_never_dropped(device, name):
    x = problem(17, 3, dtype=torch.float32, batch=1)
    with torch.no_grad():
        tensor = getattr(x, name)
        tensor[(..., 4, slice(None)) if tensor.ndim == 4 else (..., slice(None), 0)] = torch.nan
        if name == "key":
            tensor.copy_(torch.copysign(tensor, torch.tensor(-1.0)))  # a negative NaN too
        expected, found = reference_attention(x), fused_attention(on(device, x))
    assert torch.equal(found.isnan().cpu(), expected.isnan())
