"""Problems for the Triton kernels, and how they are run."""

import os
from functools import partial
from pathlib import Path

import torch

from cytossl_core.attention.fused import fused_attention
from cytossl_core.attention.inputs import Inputs
from tests.core.test_attention import problem as any_problem

ROOT = Path(__file__).resolve().parents[2]
problem = partial(any_problem, ratio=0.7)  # ten buckets: the interpreter is slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
