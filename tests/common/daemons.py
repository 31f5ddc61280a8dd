"""A Dask scheduler and workers as processes of their own, as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.common import cache

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, folder: str = "elsewhere", **environment: str) -> subprocess.Popen:
    """A daemon in the folder, which is told nothing of repository and cache."""
    Path(folder).mkdir(exist_ok=True)
    dropped = ("CYTOSSL_CACHE", "DVC_ROOT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.Popen(
        [Path(sys.executable).with_name("dask"), *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(process: subprocess.Popen) -> None:
    """With all its children, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def cluster(
    workers: int, *options: str, of_scheduler: dict[str, str] | None = None, **environment: str
) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address of a scheduler, and its process followed by those of its workers."""
    file = str(Path("s.json").resolve())
    Path(file).unlink(missing_ok=True)  # of a scheduler before this one
    shared = ("--scheduler-file", file, "--no-dashboard")
    started = [start("scheduler", *shared, "--port", "0", **(of_scheduler or {}))]
    try:
        while not Path(file).exists():
            time.sleep(0.05)
        command = ("worker", *shared, "--nthreads", "1", *options)
        started += [start(*command, **environment) for _ in range(workers)]
        yield _address(file, workers), started
    finally:
        for process in reversed(started):
            stop(process)


def _address(file: str, workers: int) -> str:
    from distributed import Client

    with Client(scheduler_file=file) as client:
        client.wait_for_workers(workers, timeout=60)
        return client.scheduler.address


def finished(stage: str = "toy") -> int:
    """How many results the cache holds."""
    return len(list((cache.root() / stage).glob("*/*/made.json")))


def wait_for(results: int) -> None:
    """Until the cache holds so many."""
    while finished() < results:
        time.sleep(0.02)
