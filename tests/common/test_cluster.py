"""Workers that die: exactly the slides to blame fail, and none that was finished is redone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from stages.common import cache, perslide
from stages.common.perslide import Job
from tests.common import toy

FAILURES = {"s05": "raise", "s07": "kill once", "s11": "kill"}
NAMES = [f"s{number:02d}" for number in range(16)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_engine("")


def write_engine(scheduler: str) -> None:
    Path("params.yaml").write_text(f'engine:\n  workers: 2\n  scheduler: "{scheduler}"\n')


def run() -> str:
    """Sixteen slides; what the failed stage says."""
    here = Path.cwd()
    common = {"mark": str(here / "mark"), "journal": str(here / "journal"), "wait": 0.1}
    work = [Job(name, ("x",), {**common, "failure": FAILURES.get(name)}) for name in NAMES]
    code = ("stages.common.stores",)
    with pytest.raises(ValueError, match="slides failed") as error:
        perslide.run("toy", toy.make, work, Path("data/toy"), code=code, settings={})
    return str(error.value)


def finished() -> int:
    return len(list((cache.root() / "toy").glob("*/*/made.json")))


def begun() -> Counter[str]:
    return Counter(Path("journal").read_text().split())


def assert_exact(text: str) -> None:
    assert "2 of 16 slides failed" in text
    assert "s05: slide s05 is cut short" in text
    assert "s11: its worker process died" in text
    assert finished() == 14


def test_only_the_slides_to_blame_fail_and_none_is_redone():
    assert_exact(run())
    counts = begun()
    assert counts["s07"] == 2 and counts["s11"] == 3
    assert counts["s05"] <= 2  # twice when the worker died before it could tell of the error
    # A neighbour that was at work in the other process is finished there, once.
    assert {counts[name] for name in NAMES if name not in FAILURES} == {1}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_midway(process: subprocess.Popen) -> None:
    while finished() < 3:
        time.sleep(0.02)
    stop(process)


def test_a_scheduler_and_two_workers_one_of_them_killed_midway():
    started = [
        start("dask_scheduler", "--scheduler-file", "s.json", "--port", "0", "--no-dashboard")
    ]
    try:
        while not Path("s.json").exists():
            time.sleep(0.05)
        worker = ("dask_worker", "--scheduler-file", "s.json", "--nthreads", "1", "--no-dashboard")
        started += [start(*worker, "--name", name) for name in ("0", "1")]
        write_engine(address_with_workers(2))
        killer = threading.Thread(target=kill_midway, args=(started[2],))
        killer.start()
        assert_exact(run())
        killer.join()
    finally:
        for process in reversed(started):
            stop(process)
    counts = begun()
    assert counts["s05"] <= 2
    again = [name for name in NAMES if name not in FAILURES and counts[name] > 1]
    assert len(again) <= 1  # what the lost worker was at, unfinished


def address_with_workers(count: int) -> str:
    from distributed import Client

    with Client(scheduler_file="s.json") as client:
        client.wait_for_workers(count, timeout=60)
        return client.scheduler.address
