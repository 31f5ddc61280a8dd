"""When the Triton kernels are taken, and that they compile."""

import os
import subprocess
import sys

import pytest
import torch

from cytossl_core.attention import fused, sr_attention_backend
from cytossl_core.attention.fused import refusal
from cytossl_core.attention.inputs import Inputs
from cytossl_core.attention.reference import reference_attention
from tests.conftest import TOLERANCE
from tests.core.fused_cases import INTERPRETED, ROOT, on, problem, run_fused
from tests.core.test_attention import assert_same, run


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
        ({"table_k": torch.zeros(1, 256, 5)}, "a table has more than 255 buckets"),
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
from cytossl_core.attention import kernels_backward, kernels_forward, launch

KINDS = {
    "*bf16": ("query", "key", "value", "grad", "out", "d_query", "d_key", "d_value", "bias"),
    "*fp32": ("table_k", "table_q", "table_v", "lse", "delta", "parts_k", "parts_v", "parts_q"),
    "*i16": ("ids", "ids_t"), "*u8": ("order",), "*i8": ("last",), "*i32": ("kept",),
    "fp32": ("scale",),
}
TYPES = {name: kind for kind, names in KINDS.items() for name in names}

def compile(kernel, tile):
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = tile | {"BLOCK_C": 64, "bias": None}
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names}
    signature |= {name: "constexpr" for name in constants}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    options |= {"enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 232448

for token, topk in ((37, 16), (1025, 16), (1025, 100)):
    compile(kernels_forward.forward, launch.forward_tiles(token, 64, topk, True, True)[0])
for kernel in (kernels_backward.backward_query, kernels_backward.backward_key):
    compile(kernel, launch.backward_tiles(197, 64, True, True)[0])
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
