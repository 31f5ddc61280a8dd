"""What the results of each per-slide stage take on the disk; what is not known is bounded above."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import UInt8

from stages.common import headers, patches, stores
from stages.common.disk import Needs

SLIDES, PATCHES = 8, 3  # so many slides, and patches of each, are looked at
# Bytes a slide: pictures, and some ten small files of a block (4 KiB) each or more.
PICTURES = {"tile": 250_000, "detect": 400_000, "perturb": 400_000, "embed": 30_000}
NUCLEI = 600  # bytes a patch: some 20 nuclei of 28 bytes
RECIPE = 300  # bytes a patch: seed, row, and some 20 points
APART = ("random", "densest")  # samplings whose patches do not overlap

T = TypeVar("T")


class Cut(Protocol):
    """What of section tile decides what patches take."""

    mpp: float
    patch_px: int
    sampling: str
    patches_per_slide: int
    stride_px: int
    codec: str


def some(of: Sequence[T]) -> list[T]:
    """A few, spread evenly."""
    spread = np.linspace(0, len(of) - 1, min(SLIDES, len(of))).astype(int)
    return [of[at] for at in np.unique(spread).tolist()]


def shuffled_lengths(pixels: Iterable[UInt8[np.ndarray, "px px 3"]]) -> list[int]:
    """Bytes of each patch when all its pixels are shuffled, which is the most that a view takes."""
    rng = np.random.default_rng(0)
    mixed = (rng.permutation(one.reshape(-1, 3)).reshape(one.shape) for one in pixels)
    return [len(chunk) for one in mixed for chunk in patches.encoded([one], "zstd", len(one))]


def tile(slides: int, count: float, stored: float, cut: Cut) -> Needs:
    """Of `count` patches in the stores, each `stored` bytes."""
    total = slides * PICTURES["tile"] + count * stored
    remedy = f"{'lower' if cut.patches_per_slide else 'set'} tile.patches_per_slide"
    return Needs(total, remedy, firm=is_firm(cut))


def is_firm(cut: Cut) -> bool:
    """Whether about as many patches will be cut as may be: without a limit only cells decide."""
    return cut.patches_per_slide > 0 or cut.sampling == "all"


def detect(slides: int, count: float) -> Needs:
    """Of the nuclei in `count` patches."""
    return Needs(slides * PICTURES["detect"] + count * NUCLEI, "lower tile.patches_per_slide")


def perturb(slides: int, count: float, shuffled: float, store: str) -> Needs:
    """Of the views of `count` patches, each `shuffled` bytes as pixels."""
    each, remedy = RECIPE, "lower tile.patches_per_slide"
    if store == "pixels":
        each, remedy = shuffled, "set perturb.store to recipe"
    return Needs(slides * PICTURES["perturb"] + count * each, remedy)


def embed(slides: int, count: float, dim: int, crop: bool) -> Needs:
    """Of one encoder's bags."""
    total = slides * PICTURES["embed"] + count * dim * 4 * (1 + crop)
    return Needs(total, "lower tile.patches_per_slide, or name fewer in embed.encoders")


def cut_patches(folders: Sequence[Path]) -> int:
    """How many patches the slides of the stage tile have."""
    return sum(headers.length(folder / "patches.zarr", "patch") for folder in folders)


def shuffled_bytes(folders: Sequence[Path]) -> float:
    """Bytes of a shuffled patch, the mean of some of the stage tile's."""
    opened = [stores.open_patches(folder / "patches.zarr") for folder in some(folders)]
    pixels = [store[at] for store in opened for at in range(min(PATCHES, len(store)))]
    return float(np.mean(shuffled_lengths(pixels))) if pixels else 0.0
