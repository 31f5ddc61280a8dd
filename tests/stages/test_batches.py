"""Batches through a detector: halved when memory runs out, said once, and nothing swallowed."""

import numpy as np
import pytest
import torch

from stages.detectors import Detection, _batches


class Small:
    """Torch's own error above so many patches; else as many nuclei as the patch's first value."""

    version = "small"

    def __init__(self, fits: int, device: str = "cuda:1") -> None:
        self.fits, self.device, self.tried = fits, device, []

    def __call__(self, patches, mpp):
        self.tried.append(len(patches))
        if len(patches) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        counts = [int(patch[0, 0, 0]) for patch in patches]
        return [
            Detection(np.zeros((n, 2), np.float32), *[np.ones(n, np.float32)] * 2) for n in counts
        ]


def numbered(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((5, 5, 3), np.uint8)


def test_halves_the_batch_when_memory_runs_out_and_says_so_once(caplog):
    detector = Small(fits=3)
    batches = _batches.Batches(detector, 13)
    for _ in range(2):
        assert [len(one.score) for one in batches(numbered(17), 0.5)] == list(range(17))
    assert detector.tried == [13, 6, *[3] * 5, 2, *[3] * 5, 2]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "13 patches at once do not fit the memory of cuda:1" in said[0]
    assert "going on with 3; set detect.batch_patches to that" in said[0]


def test_halves_what_was_tried_and_not_the_setting(caplog):
    detector = Small(fits=2)
    assert len(list(_batches.Batches(detector, 99)(numbered(5), 0.5))) == 5
    assert detector.tried == [5, 2, 2, 1] and len(caplog.records) == 1


def test_one_patch_too_many_names_the_batch_and_the_device():
    message = "one patch of 5 px .* memory of cuda:1, and detect.batch_patches cannot be below 1"
    with pytest.raises(ValueError, match=message):
        list(_batches.Batches(Small(fits=0), 4)(numbered(5), 0.5))


def test_other_errors_of_a_detector_are_not_swallowed():
    class Broken(Small):
        def __call__(self, patches, mpp):
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(_batches.Batches(Broken(1), 4)(numbered(5), 0.5))
