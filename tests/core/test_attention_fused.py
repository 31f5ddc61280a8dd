"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cytossl_core.attention import fused, launch, sr_attention, sr_attention_backend
from cytossl_core.attention.fused import fused_attention, refusal
from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import reference_attention
from tests.conftest import TOLERANCE
from tests.core.test_attention import assert_same, run
from tests.core.test_attention import problem as any_problem

ROOT = Path(__file__).resolve().parents[2]
problem = partial(any_problem, ratio=0.7)  # ten buckets: the interpreter is slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device: test_kernels_in_the_interpreter runs this in a process apart")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def tiled(monkeypatch):
    """Sequences over 64 tokens take the kernel for long ones."""
    monkeypatch.setattr(launch, "TILE_BYTES", 0)


def on(device, x):
    """The same inputs, as leaves, on a device."""
    moved = {}
    for name, value in vars(x).items():
        if isinstance(value, torch.Tensor):
            value = value.detach().to(device).requires_grad_(value.requires_grad)
        moved[name] = value
    return Inputs(**moved)


def run_fused(x):
    """As `run`, but kernels take half precision as it is."""
    tensors = [x.query, x.key, x.value, *x.tables.values()]
    out = fused_attention(x).to(x.query.dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
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


@pytest.mark.parametrize(("topk", "heads"), [(7, (1, 3, 1)), (None, (0, 1, 0))])
def test_tiled_kernel_matches_reference_with_all_gradients(device, tiled, topk, heads):
    x = problem(67, topk, heads, torch.float32, batch=1)
    expected = [t.to(device) for t in run(reference_attention, x)]
    assert_same(run_fused(on(device, x)), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("token", [37, 67])
def test_padded_keys_and_rows_without_keys(device, tiled, token):
    bias = torch.zeros(1, 1, token, token)
    bias[..., 11:] = -torch.inf  # fewer keys than h
    bias[..., 5, :] = -torch.inf
    x = problem(token, 16, (0, 0, 0), torch.float32, batch=1, bias=bias)
    expected = [t.to(device) for t in run(reference_attention, x)]
    found = run_fused(on(device, x))
    assert_same(found, expected, TOLERANCE[torch.float32])
    assert torch.equal(found[0][0, :, 5], torch.zeros_like(found[0][0, :, 5]))


@pytest.mark.parametrize("topk", [1, 16, 17])
@pytest.mark.parametrize("token", [37, 67])
def test_keeps_ties_and_equal_zeros_exactly(device, tiled, token, topk):
    random = torch.Generator().manual_seed(3)
    scores = torch.randint(-2, 3, (token, token), generator=random).float()
    scores = torch.where(torch.rand(token, token, generator=random) < 0.5, scores, -scores)
    assert (scores.view(torch.int32) == torch.tensor(-0.0).view(torch.int32)).any()
    zero, eye = torch.zeros(1, 1, token, token), torch.eye(token)[None, None]
    tables = (None, None, None)
    x = Inputs(zero, zero, eye, topk, None, *tables, 1.0, scores[None, None], 0.0)
    threshold = scores.sort(dim=1, descending=True).values[:, topk - 1, None]
    assert torch.equal(fused_attention(on(device, x))[0, 0].cpu() > 0, scores >= threshold)


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


def test_takes_the_layers_strides(device):
    x = problem(37, 16, dtype=torch.float32)
    packed = torch.stack([x.query, x.key, x.value]).permute(1, 3, 0, 2, 4).contiguous().to(device)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    arguments = {"topk": 16, "buckets": x.buckets.to(device)}
    arguments |= {name: table.to(device) for name, table in x.tables.items()}
    found = sr_attention(query, key, value, backend="triton", **arguments)
    expected = reference_attention(x).to(device)
    assert_same([found], [expected], TOLERANCE[torch.float32])


def test_same_inputs_give_the_same_bits(device):
    x = on(device, problem(17, 7, dtype=torch.float32, batch=1))
    for a, b in zip(run_fused(x), run_fused(x), strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch_stays_empty(device):
    query = torch.zeros(0, 3, 17, 5, device=device, requires_grad=True)
    sr_attention(query, query, query, topk=4, backend="triton").sum().backward()
    assert query.grad.shape == (0, 3, 17, 5)


def test_operators_tell_compilers_the_truth(device):
    x = on(device, problem(17, 3, (0, 0, 0), torch.float32, batch=1))
    arguments = (x.query, x.key, x.value, None, None, None, None, 0.5, 3, 0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.cytossl.sr_forward, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("token", [37, 197, 257, 1025, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_on_a_gpu(token, dtype):
    heads = (1, 1, 1) if token < 1025 else (0, 0, 0)
    x = problem(token, 16, heads, dtype, batch=1, dim=64)
    if dtype == torch.bfloat16:  # whole numbers, so that no two ways to add round differently
        with torch.no_grad():
            for tensor in (x.query, x.key):
                tensor.round_()
    x = on("cuda", x)
    assert_same(run_fused(x), run(reference_attention, x), 10 * TOLERANCE[dtype])


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    assert sr_attention_backend(torch.zeros(1, 3, 197, 64, device="cuda")) == "triton"


def test_auto_takes_torch_on_a_cpu():
    assert sr_attention_backend(torch.zeros(1, 3, 197, 64)) == "torch"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "query is on cpu"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"query": torch.zeros(1, 1, 3, 5).double()}, "query is torch.float64"),
        ({"query": torch.zeros(1, 1, 3, 257)}, "over 16384 tokens or a width of 256"),
        ({"table_k": torch.zeros(1, 257, 5)}, "a table has more than 256 buckets"),
        ({"bias": torch.zeros(1, 1, 1, 3, requires_grad=True)}, "bias requires a gradient"),
    ],
)
def test_says_why_not_triton(changes, why, monkeypatch):
    pytest.importorskip("triton")
    if changes:
        monkeypatch.setattr(fused, "INTERPRETED", True)
    elif INTERPRETED:
        pytest.skip("the interpreter works on a CPU")
    query = torch.zeros(1, 1, 3, 5)
    x = Inputs(query, query, query, 1, None, None, None, None, 1.0, None, 0.0)
    assert why in refusal(Inputs(**vars(x) | changes))


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from cytossl_core.attention import SRAttention, sr_attention
assert SRAttention(15, 3)(torch.randn(2, 10, 15)).shape == (2, 10, 15)
query = torch.zeros(1, 1, 3, 5)
try:
    sr_attention(query, query, query, backend="triton")
except ValueError as error:
    assert "Triton is not installed: take 'torch' or 'auto'" in str(error), error
else:
    raise AssertionError
"""


def test_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cytossl_core.attention import kernels_backward, kernels_forward

ROWS = ("query", "key", "value", "grad", "d_query", "d_key", "d_value", "bias")
OTHERS = {"ids": "*i16", "kept": "*i32", "scale": "fp32"}
SUMS = ("out", "lse", "hist", "q_table", "k_table", "delta", "grad_hist", "d_q_table", "d_k_table")

def compile(kernel, **constants):
    constants |= dict(HAS_K=True, HAS_Q=True, HAS_V=True, HAS_BIAS=True, BLOCK_D=64, BLOCK_C=64)
    types = {name: "*bf16" for name in ROWS} | {name: "*fp32" for name in SUMS} | OTHERS
    types |= {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]

compile(kernels_forward.forward_whole, DENSE=False, BLOCK_M=64, BLOCK_N=64)
compile(kernels_forward.forward_tiled, DENSE=False, BLOCK_M=32, BLOCK_N=64)
compile(kernels_backward.backward_query, BLOCK_M=32, BLOCK_N=32)
compile(kernels_backward.backward_key, BLOCK_M=32, BLOCK_N=32)
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
