"""Workers: one GPU each, of this repository's code, one thread."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dask
import pytest

from stages.common import devices, perslide
from stages.common.perslide import Job
from tests.common import daemons, toy

SETTINGS = """
engine:
  workers: 2
  scheduler: "%s"
  wait_minutes: 0.5
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository of its own, with a cache of its own; locks of GPUs are its own, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(daemons.ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    write_engine("")


def write_engine(scheduler: str) -> None:
    Path("params.yaml").write_text(SETTINGS % scheduler)


def run(count: int, device: str = "", wait: float = 0.0) -> Counter[str]:
    """How many slides each device had."""
    work = [Job(f"s{number}", (), {"wait": wait}) for number in range(count)]
    target = Path("data/toy")
    code = ("stages.common.stores",)
    perslide.run("toy", toy.make, work, target, code=code, settings={}, device=device)
    return Counter(file.read_text() for file in target.glob("*/device.txt"))


PRELOAD = str(daemons.ROOT / "tests/common/two_gpus.py")
HOLD = "from tests.common import two_gpus\nfrom stages.common import devices\n"
HOLD += "print(devices.hold(), devices.hold(), flush=True)\ninput()"


def holder(seen: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "SEEN": seen},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_each_process_holds_a_device_of_its_own_until_it_ends():
    # The second sees the devices in another order, as dask-cuda has its workers; the third finds
    # both taken, until the first is killed.
    first, second, third = (holder(seen) for seen in ("x,y", "y,x", "x,y"))
    try:
        assert [said for _, said in (first, second, third)] == [
            "cuda:0 cuda:0",
            "cuda:0 cuda:0",
            "",
        ]
        first[0].kill()
        first[0].wait()
        fourth = holder("y,x")
        assert fourth[1] == "cuda:1 cuda:1"
    finally:
        for process in (first[0], second[0], third[0], fourth[0]):
            process.kill()
            process.communicate()


def test_workers_use_a_gpu_each_and_those_without_one_are_left_alone():
    with daemons.cluster(3, "--preload", PRELOAD, SEEN="x,y") as (address, _):
        write_engine(address)
        used = run(6, "cuda", wait=0.1)
        assert set(used) == {"cuda:0", "cuda:1"} and used.total() == 6
        assert run(7, "cpu") == {"cuda:0": 3, "cuda:1": 3, "cpu": 1}  # what is there stays


def test_on_this_machine_there_is_a_process_for_each_gpu(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda: 2)
    Path("params.yaml").write_text((SETTINGS % "").replace("workers: 2", "workers: 4"))
    monkeypatch.setenv("SEEN", "x,y")
    with dask.config.set({"distributed.worker.preload": [PRELOAD]}):
        used = run(6, "cuda", wait=0.2)
    assert set(used) == {"cuda:0", "cuda:1"} and used.total() == 6


def test_no_worker_with_a_gpu_is_an_error(monkeypatch):
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("wait_minutes: 0.5", "wait_minutes: 0.05"))
    with pytest.raises(ConnectionError, match="no worker has a GPU of its own on this machine"):
        run(1, "cuda")


def test_scheduler_and_workers_start_as_the_refusal_says():
    here = {"folder": str(daemons.ROOT), "PYTHONPATH": "."}
    with daemons.cluster(1, of_scheduler=here, **here) as (address, _):
        write_engine(address)
        assert run(1).total() == 1


def test_refuses_a_scheduler_that_cannot_import_the_stages():
    bare = {"folder": str(daemons.ROOT), "PYTHONPATH": ""}
    with daemons.cluster(1, of_scheduler=bare) as (address, _):
        write_engine(address)
        with pytest.raises(ValueError, match=f"the scheduler {address} cannot run .*'stages'"):
            run(1)


def test_refuses_workers_that_began_with_other_code(tmp_path):
    # A copy of the code that is edited afterwards, as under workers that live for days.
    for package in ("stages", "cytossl_core"):
        shutil.copytree(daemons.ROOT / package, tmp_path / "copy" / package)
    edited = tmp_path / "copy/stages/common/run.py"
    edited.write_text(edited.read_text() + "# edited\n")
    with daemons.cluster(1, PYTHONPATH=f"{tmp_path}/copy") as (address, _):
        write_engine(address)
        with pytest.raises(ValueError, match="the worker .* runs other code than lies here: re"):
            run(1)


def test_refuses_workers_without_the_code_or_of_many_threads():
    with daemons.cluster(1, PYTHONPATH="") as (address, _):
        write_engine(address)
        with pytest.raises(ValueError, match="the worker .* cannot run .*PYTHONPATH=. dask"):
            run(1)
    with daemons.cluster(1, "--nthreads", "2") as (address, _):
        write_engine(address)
        with pytest.raises(ValueError, match="has 2 threads: .* --nthreads 1 --nworkers 2"):
            run(1)
