"""What every test shares: the folder of real images, tolerances, threads, the order of files."""

import os
from pathlib import Path

# Before torch is imported, and for all processes that tests start: the suite runs in two processes
# (Makefile), and threads that wait for a busy core slow each other up tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Largest relative RMS error allowed between a fast path and its definition, by dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real cytology images beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no real images: {SHARED.name} is not beside the repository")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are slow as a whole come first, so that no process is left alone with one.

    Tests marked `gpu` are skipped where there is no CUDA device.
    """
    items.sort(key=lambda item: not _slow_as_a_whole(item))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _slow_as_a_whole(item: pytest.Item) -> bool:
    module = item.getparent(pytest.Module)
    return module is not None and any(mark.name == "slow" for mark in module.own_markers)
