"""Patches of several slides in batches of one shape, read while the device computes."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from stages.common import cache
from stages.common.patches import PatchStore

AHEAD = 2  # batches that are read or wait, beside the one in use

Batch = UInt8[Tensor, "batch px px 3"]


def batches(
    slides: Sequence[PatchStore], batch: int, threads: int, pinned: bool = False
) -> Iterator[Batch]:
    """Every patch of every slide once, in order; a batch goes on from one slide to the next.

    Codecs release the interpreter, so that `threads` of them run beside each other and beside the
    caller. The last batch is filled up with black patches.

    Args:
        slides: Open stores with patches of one side.
        batch: Patches in each batch.
        threads: How many decode at once.
        pinned: Whether batches lie where a GPU fetches them by itself.

    Raises:
        ValueError: a patch cannot be read; names slide and remedy.
    """
    places = ((slide, row) for slide in slides for row in range(len(slide)))
    waiting: deque[tuple[Batch, list[Future]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        while some := list(itertools.islice(places, batch)):
            waiting.append(_begin(pool, some, batch, pinned))
            if len(waiting) > AHEAD:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor, places: list[tuple[PatchStore, int]], batch: int, pinned: bool
) -> tuple[Batch, list[Future]]:
    px = places[0][0].patch_px
    pixels = torch.empty(batch, px, px, 3, dtype=torch.uint8, pin_memory=pinned)
    pixels[len(places) :] = 0
    rows = zip(pixels.numpy(), places, strict=False)
    return pixels, [pool.submit(_read, out, *place) for out, place in rows]


def _finished(pixels: Batch, reads: list[Future]) -> Batch:
    for read in reads:
        read.result()
    return pixels


def _read(out: np.ndarray, slide: PatchStore, row: int) -> None:
    try:
        out[:] = slide[row]
    except (ValueError, IndexError, OSError, RuntimeError) as error:
        raise ValueError(_damaged(slide, row, error)) from error


def _damaged(slide: PatchStore, row: int, error: Exception) -> str:
    file = slide.path / "patch" / f"c.{row // slide.shard_patches}.0.0.0"
    kept = cache.entry("tile", cache.describe(slide.path.parent)["key"])
    return (
        f"slide {slide.attributes['slide_id']}: patch {row} cannot be read from {file} ({error}): "
        f"run `find . -samefile {file} -delete`, which takes its links in DVC's cache along, "
        f"delete {kept} and run `dvc repro --force --single-item tile`"
    )
