"""Random numbers that are a hash of what they are for, so that no order of work changes them."""

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# SplitMix64 (Steele et al. 2014), as in cytossl_core/perturbation.py.
_STEP, _FIRST, _SECOND = (
    np.array(number, np.uint64)
    for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def keys_of(seed: int, epoch: int, patches: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """A key for each patch from the run's seed, the epoch and the patch's number."""
    keys = np.array([seed % 2**64], np.uint64)
    for number in (np.array([epoch], np.uint64), patches.numpy().view(np.uint64)):
        keys = _mixed(_mixed(keys) ^ number)
    return torch.from_numpy(keys.view(np.int64))


def uniform(
    keys: Int64[Tensor, " batch"], number: int, count: int
) -> Float64[np.ndarray, "count batch"]:
    """Numbers in [0, 1): SplitMix64 started at a hash of the key and of `number`."""
    start = _mixed(_mixed(keys.numpy().view(np.uint64)) ^ np.array([number], np.uint64))
    steps = np.arange(1, count + 1, dtype=np.uint64)[:, None] * _STEP
    return (_mixed(start + steps) >> np.uint64(11)) * 2.0**-53


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
