"""Patches through a detector in batches that fit the memory of its device."""

import functools
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from stages.common.memory import is_out_of_memory
from stages.detectors import Detection, Detector

logger = logging.getLogger(__name__)


class Batches:
    """Runs a detector; from the first time that memory runs out, on half as many patches.

    It halves until it fits, says so once, and stays there for all slides that follow.
    """

    def __init__(self, detector: Detector, batch: int) -> None:
        self._detector = detector
        self._batch = batch
        self._failed = 0  # patches that did not fit, until a number that fits is found

    def __call__(self, patches: Sequence[np.ndarray], mpp: float) -> Iterator[Detection]:
        """The nuclei of each patch.

        Args:
            patches: Uint8 [height, width, 3], of one size; read as they are needed.
            mpp: Microns per pixel of the patches.

        Raises:
            ValueError: not even one patch fits the memory.
        """
        begin = 0
        while begin < len(patches):
            end = min(begin + self._batch, len(patches))
            some = np.stack([patches[row] for row in range(begin, end)])
            found = self._attempt(some, mpp)
            if found is None:
                self._halve(len(some), some.shape[1])
                continue
            if self._failed:
                self._say()
            yield from found
            begin = end

    def _attempt(self, patches: np.ndarray, mpp: float) -> list[Detection] | None:
        """None when memory ran out. What the failed run held is free once this has returned."""
        try:
            return self._detector(patches, mpp)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _halve(self, tried: int, side_px: int) -> None:
        device = self._detector.device
        if tried == 1:
            raise ValueError(
                f"one patch of {side_px} px does not fit the memory of {device}, and "
                "detect.batch_patches cannot be below 1: end what else runs on it, set the "
                "detector's device to cpu, or, where patches come from tile, lower tile.patch_px"
            )
        self._failed = self._failed or tried
        self._batch = tried // 2

    def _say(self) -> None:
        logger.warning(
            "detect: %d patches at once do not fit the memory of %s: going on with %d; "
            "set detect.batch_patches to that",
            self._failed,
            self._detector.device,
            self._batch,
        )
        self._failed = 0


@functools.cache
def of(detector: Detector, batch: int) -> Batches:
    """One a process, and so one a GPU: what it learned of the memory holds for the next slide."""
    return Batches(detector, batch)
