"""Which device a network runs on: the params say auto, cpu or cuda, in a worker the engine does.

A worker process that is to have a GPU of its own takes it by a lock on a file named after the
device's UUID. So it is right on every machine of a cluster and however workers are named or see
their devices (CUDA_VISIBLE_DEVICES, jobs of SLURM); the lock ends with the process, killed or not.
"""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

WORKER = "CYTOSSL_WORKER"  # the number of this worker process, set by the engine
DEVICE = "CYTOSSL_DEVICE"  # its device, set by the engine: cpu, or that which it holds

_held: dict[str, IO[str]] = {}  # device of this process -> its locked file, open until it ends


def count() -> int:
    """CUDA devices of this machine that this process may use."""
    import torch  # here: what needs no network must not pay for the import

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def uuids() -> list[str]:
    """What tells the devices that this process may use from all others, in torch's order."""
    import torch

    return [str(torch.cuda.get_device_properties(at).uuid) for at in range(count())]


def hold() -> str:
    """Take a CUDA device for this process alone, until it ends.

    Returns:
        "cuda:<i>", of a process always the same one; empty where no device is free.
    """
    for at, uuid in enumerate(uuids() if not _held else []):
        file = _lock(uuid)
        if file:
            _held[f"cuda:{at}"] = file
            break
    return next(iter(_held), "")


def _lock(uuid: str) -> IO[str] | None:
    folder = Path(tempfile.gettempdir()) / f"cytossl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = (folder / f"{uuid}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another process has it
        file.close()
        return None
    return file


def pick(wanted: str, section: str) -> str:
    """The device to run on: "cpu", "cuda", or in a worker process "cuda:<i>".

    Args:
        wanted: auto (cuda where there is a device), cpu or cuda. In a worker process the engine
            knows better, if it was told a device: all workers must make the same bytes.
        section: Where in params.yaml its key `device` stands, for the message.

    Raises:
        ValueError: cuda is wanted, and there is no device.
    """
    if wanted == "cpu":
        return "cpu"
    if os.environ.get(DEVICE):
        return os.environ[DEVICE]
    there = count()
    if not there:
        if wanted == "auto":
            return "cpu"
        raise ValueError(f"{section}.device is cuda, and there is none: set it to auto or cpu")
    worker = os.environ.get(WORKER)
    return "cuda" if worker is None else f"cuda:{int(worker) % there}"
