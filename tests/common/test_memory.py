"""Errors that say that memory ran out, whatever their type."""

import pytest
import torch

from stages.common.memory import is_out_of_memory


@pytest.mark.parametrize(
    "text",
    [
        "The following operation failed in the TorchScript interpreter.\nCUDA out of memory.",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_knows_memory_errors_that_have_no_type_of_their_own(text):
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("anything")])
def test_knows_them_by_type(error):
    assert is_out_of_memory(error)


def test_other_errors_are_others():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
