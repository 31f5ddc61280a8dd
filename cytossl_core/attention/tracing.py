"""Whether torch looks on while attention runs: then values are no use, and caches must wait."""

import torch
from torch import Tensor, nn


def transformed() -> bool:
    """Whether torch.jit traces, or a transform of torch.func (vmap, grad) is at work."""
    if torch.compiler.is_compiling():
        return False  # a compiler asks for itself, and cannot read the rest
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def plain(*tensors: Tensor) -> bool:
    """Whether these hold numbers that may be read here: not traced, fake, wrapped or on meta."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors)
