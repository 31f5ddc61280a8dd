"""Fixtures of the tests of Triton kernels."""

import pytest
import torch

from tests.core.fused_cases import INTERPRETED


@pytest.fixture
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device: test_kernels_in_the_interpreter runs this in a process apart")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def tiled(monkeypatch):
    """Every sequence takes the way of long ones."""
    from cytossl_core.attention import launch  # noqa: PLC0415  needs Triton

    monkeypatch.setattr(launch, "MOST_WHOLE", 0)
    launch._fitting.clear()
    yield
    launch._fitting.clear()
