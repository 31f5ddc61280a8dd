"""Slides through an encoder: their patches become embeddings.

Batches go on from one slide to the next, so that slides of 20 patches fill batches of 256 as well
as others; patches are decoded and copied while the device computes, and a patch is read once for
all its parts. Every batch has the same shape: the last is filled up.

What then holds of an embedding's bits: the same slides in the same order and batches give the same
bits. In other company, and so at another place of its batch, a patch has the same numbers up to
rounding only: kernels of matrix products may sum their last rows otherwise. (Measured on a CPU with
batches of one shape: ViTs and ResNets kept every bit at every place, a CNN that ends in a linear
layer did not; batches of another shape changed bits of all.) So whoever promises bytes gives each
slide batches of its own. Where a batch did not fit the memory and was halved, too, the rest holds
up to rounding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from stages.common import encoders, reading
from stages.common.memory import is_out_of_memory
from stages.common.patches import PatchStore
from stages.common.spec import EncoderSpec

logger = logging.getLogger(__name__)

Patches = UInt8[Tensor, "batch height width 3"]
Part = Callable[[Patches], Patches]
Autocast = Literal["none", "bf16", "fp16"]


def whole(patches: Patches) -> Patches:
    """The patches as they are."""
    return patches


def central_half(patches: Patches) -> Patches:
    """The middle of each patch, half its side; one pixel more where half has no middle."""
    px = patches.shape[1]
    side = px // 2 + (px - px // 2) % 2  # as odd or even as px, or the middle lies off by half
    start = (px - side) // 2
    return patches[:, start : start + side, start : start + side]


class Network:
    """An encoder on its device; when memory runs out it takes half as many patches at once.

    It halves until they fit, says so once, and stays there for all slides that follow.
    """

    def __init__(
        self, model: nn.Module, spec: EncoderSpec, device: str, autocast: Autocast = "none"
    ) -> None:
        self.model, self.spec = model.to(device).eval(), spec
        self.device = torch.device(device)
        self.dim = model.num_features
        self._dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[autocast]
        self._most: int | None = None  # patches that fit at once; None: as many as are given
        # A queue of its own for copies, which then go on beside the work on the batch before.
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(
        self, patches: Patches, parts: Sequence[Part] = (whole,)
    ) -> Float32[Tensor, "part batch dim"]:
        """The class token (of a CNN the mean of the last map) of each part of each patch.

        The encoder gets every part at its own side: a smaller one is magnified.

        Raises:
            ValueError: not even one patch fits the memory.
        """
        failed = 0
        while (found := self._attempt(patches, parts)) is None:
            failed = failed or min(len(patches), self._most or len(patches))
            self._halve(len(patches))
        if failed:
            logger.warning(
                "embed: %d patches at once do not fit the memory of %s: going on with %d; set "
                "embed.batch to that",
                failed,
                self.device,
                self._most,
            )
        return found

    def _attempt(self, patches: Patches, parts: Sequence[Part]) -> Tensor | None:
        """None when memory ran out. What the failed run held is free once this has returned."""
        try:
            pieces = self._moved(patches).split(self._most or len(patches))
            return torch.cat([self._forward(piece, parts) for piece in pieces], dim=1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _moved(self, patches: Patches) -> Patches:
        """The patches on the device; on a GPU what works on them next waits for their arrival."""
        if not self._copies:
            return patches.to(self.device)
        with torch.cuda.stream(self._copies):
            moved = patches.to(self.device, non_blocking=True)
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self._copies)
        moved.record_stream(here)
        return moved

    def _halve(self, count: int) -> None:
        tried = min(count, self._most or count)
        if tried == 1:
            raise ValueError(
                f"one patch does not fit the memory of {self.device} with an encoder of "
                f"{self.spec.image_px} px: end what else runs on it, set embed.autocast to bf16, "
                "or embed.device to cpu"
            )
        self._most = tried // 2

    @torch.inference_mode()
    def _forward(self, patches: Patches, parts: Sequence[Part]) -> Tensor:
        images = [self._prepare(part(patches)) for part in parts]
        enabled = self._dtype is not None
        with torch.autocast(self.device.type, self._dtype, enabled=enabled):
            return torch.stack([self.model(part).float() for part in images])

    def _prepare(self, patches: Patches) -> Tensor:
        # On a CPU one by one: its cache holds the pixels of one as float32, and not of a batch.
        some = 1 if self.device.type == "cpu" else len(patches)
        return torch.cat([encoders.prepare(piece, self.spec) for piece in patches.split(some)])


def embed(
    slides: Sequence[PatchStore],
    network: Network,
    batch: int,
    parts: Sequence[Part] = (whole,),
    threads: int = 1,
) -> Iterator[Float32[np.ndarray, "part patch dim"]]:
    """The embeddings of each slide in order, its patches in their order.

    Args:
        slides: Open stores with patches of the side that the encoder was trained on.
        network: The encoder.
        batch: Patches that go through the network together.
        parts: What of each patch is embedded.
        threads: How many decode patches.

    Raises:
        ValueError: a patch cannot be read, or one alone does not fit the memory. Slides before it
            may have been yielded; the others are had by leaving that one out.
    """
    pinned = network.device.type == "cuda"
    given = reading.batches(slides, batch, threads, pinned)
    results = _results(given, network, parts)
    rest = np.empty((len(parts), 0, network.dim), np.float32)
    for slide in slides:
        found = [rest]
        while sum(rows.shape[1] for rows in found) < len(slide):
            found.append(next(results))
        joined = np.concatenate(found, axis=1)
        yield joined[:, : len(slide)]
        rest = joined[:, len(slide) :]


def _results(
    batches: Iterator[Patches], network: Network, parts: Sequence[Part]
) -> Iterator[np.ndarray]:
    """Each batch's embeddings, fetched when the next batch is already at work."""
    before = None
    for patches in batches:
        now = _Fetched(network(patches, parts))
        if before:
            yield before.rows()
        before = now
    if before:
        yield before.rows()


class _Fetched:
    """Embeddings on their way from the device."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.to("cpu", non_blocking=True)
        stream = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
        self._arrived = stream and stream.record_event()

    def rows(self) -> np.ndarray:
        """Wait for them."""
        if self._arrived:
            self._arrived.synchronize()
        return self._rows.numpy()
