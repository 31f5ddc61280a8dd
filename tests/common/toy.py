"""Per-slide work for the engine's tests: it must be importable in worker processes."""

import dataclasses
import errno
import os
import signal
import time
from pathlib import Path

from stages.common import devices
from stages.common.perslide import Job


def make(folder: Path, job: Job) -> None:
    """Write a file, or fail in the way that the job's arguments ask for."""
    failure = job.arguments.get("failure")
    if "journal" in job.arguments:
        with Path(job.arguments["journal"]).open("a") as journal:
            journal.write(f"{job.slide_id}\n")
    if failure == "raise":
        raise ValueError(f"slide {job.slide_id} is cut short")
    if failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "kill once":
        mark = Path(job.arguments["mark"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if failure == "say":
        raise ValueError(job.arguments["text"])
    if failure == "vanish":
        raise FileNotFoundError(f"slide {job.slide_id}.svs vanished while it was read")
    if failure == "full":
        raise OSError(28, "No space left on device")
    if failure in ("away", "away once"):
        mark = Path(f"{job.arguments['mark']}-{job.slide_id}")
        if failure == "away" or not mark.exists():
            mark.touch()
            raise OSError(errno.ESTALE, "Stale file handle", "slides/x.svs")
    time.sleep(job.arguments.get("wait", 0))
    (folder / "device.txt").write_text(os.environ[devices.DEVICE])
    (folder / "worker.txt").write_text(os.environ[devices.WORKER])
    (folder / "inner").mkdir()
    (folder / "inner" / "value.txt").write_text(f"{job.slide_id} {job.inputs}")
    (folder / "picture.jpg").write_bytes(os.urandom(8))


def make_many(folders: list[Path], jobs: list[Job]) -> None:
    """As `make`, of several slides; the journal has a line for each call."""
    with Path(jobs[0].arguments["journal"]).open("a") as journal:
        journal.write(" ".join(job.slide_id for job in jobs) + "\n")
    for folder, job in zip(folders, jobs, strict=True):
        kept = {name: value for name, value in job.arguments.items() if name != "journal"}
        make(folder, dataclasses.replace(job, arguments=kept))
