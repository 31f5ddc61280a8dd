"""Which device a network runs on: the params say auto, cpu or cuda; worker processes share GPUs."""

import os

WORKER = "CYTOSSL_WORKER"  # the number of this worker process, set by the engine


def count() -> int:
    """CUDA devices of this machine that this process may use."""
    import torch  # here: what needs no network must not pay for the import

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick(wanted: str, section: str) -> str:
    """The device to run on: "cpu", "cuda", or in a worker process "cuda:<i>", taken in turn.

    Args:
        wanted: auto (cuda where there is a device), cpu or cuda.
        section: Where in params.yaml its key `device` stands, for the message.

    Raises:
        ValueError: cuda is wanted, and there is no device.
    """
    if wanted == "cpu":
        return "cpu"
    there = count()
    if not there:
        if wanted == "auto":
            return "cpu"
        raise ValueError(f"{section}.device is cuda, and there is none: set it to auto or cpu")
    worker = os.environ.get(WORKER)
    return "cuda" if worker is None else f"cuda:{int(worker) % there}"
