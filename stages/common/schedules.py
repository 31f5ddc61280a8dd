"""Schedules over a run; progress is the share of all steps that were taken, 0 to below 1."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(peak: float, end: float, warmup: float, progress: float) -> float:
    """A line from 0 to `peak` over the first `warmup` of the run, then half a cosine to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    return cosine(peak, end, (progress - warmup) / (1 - warmup))


def warmup_flat(start: float, end: float, warmup: float, progress: float) -> float:
    """A line from `start` to `end` over the first `warmup` of the run, then `end`."""
    if progress < warmup:
        return start + (end - start) * progress / warmup
    return end
