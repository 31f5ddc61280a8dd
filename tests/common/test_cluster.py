"""Workers that die: exactly the slides to blame fail, and none that was finished is redone."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from stages.common import cluster, perslide
from stages.common.perslide import Job
from tests.common import daemons, toy
from tests.common.daemons import finished

FAILURES = {"s05": "raise", "s07": "kill once", "s11": "kill"}
NAMES = [f"s{number:02d}" for number in range(16)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(daemons.ROOT))
    write_engine("")


def write_engine(scheduler: str, wait_minutes: float = 1.0) -> None:
    Path("params.yaml").write_text(
        f'engine:\n  workers: 2\n  scheduler: "{scheduler}"\n  wait_minutes: {wait_minutes}\n'
    )


def run(failures: dict[str, str] = FAILURES, names: list[str] = NAMES, wait: float = 0.1) -> None:
    here = Path.cwd()
    common = {"mark": str(here / "mark"), "journal": str(here / "journal"), "wait": wait}
    work = [Job(name, ("x",), {**common, "failure": failures.get(name)}) for name in names]
    code = ("stages.common.stores",)
    perslide.run("toy", toy.make, work, Path("data/toy"), code=code, settings={})


def begun() -> Counter[str]:
    return Counter(Path("journal").read_text().split())


def assert_exact() -> None:
    with pytest.raises(ValueError, match="slides failed") as error:
        run()
    text = str(error.value)
    assert "2 of 16 slides failed" in text
    assert "s05: slide s05 is cut short" in text
    assert "s11: its worker process died" in text
    assert finished() == 14


def test_only_the_slides_to_blame_fail_and_none_is_redone():
    assert_exact()
    # No neighbour begins twice, nor does the slide that raised: a worker has one slide at a time.
    assert begun() == {**dict.fromkeys(NAMES, 1), "s07": 2, "s11": 3}


def test_a_scheduler_and_two_workers_one_of_them_killed_midway():
    with daemons.cluster(2) as (address, processes):
        write_engine(address)

        def kill() -> None:
            daemons.wait_for(3)
            daemons.stop(processes[2])

        killer = threading.Thread(target=kill)
        killer.start()
        assert_exact()
        killer.join()
    expected = Counter({**dict.fromkeys(NAMES, 1), "s07": 2, "s11": 3})
    again = begun() - expected
    assert not expected - begun() and again.total() <= 1  # what the lost worker had, unfinished


def test_workers_without_a_nanny_do_not_return_and_the_stage_says_so():
    with daemons.cluster(2, "--no-nanny") as (address, _):
        write_engine(address, wait_minutes=0.02)
        with pytest.raises(ConnectionError, match="no worker is left on tcp://.*with a nanny"):
            run({"s01": "kill"}, NAMES[:4])
    assert begun()["s01"] == 2 and finished() == 3  # what others could make is made, and kept


def test_a_lost_scheduler_ends_the_stage_at_once():
    with daemons.cluster(1) as (address, processes):
        write_engine(address)

        def kill() -> None:
            daemons.wait_for(1)
            daemons.stop(processes[0])

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ConnectionError, match="the scheduler tcp://.* is gone: start it again"):
            run({}, wait=0.3)
        killer.join()
    assert 1 <= finished() < 16 and not Path("data/toy").exists()


def test_an_interrupt_ends_the_stage_at_once_and_tells_nothing_of_its_workers():
    command = "from tests.common import test_cluster; test_cluster.run({}, wait=0.3)"
    pipes = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    stage = subprocess.Popen([sys.executable, "-c", command], **pipes)
    try:
        daemons.wait_for(1)
        os.killpg(stage.pid, signal.SIGINT)  # as Ctrl-C does: the workers, too
        said = stage.communicate(timeout=30)[1]
    finally:
        daemons.stop(stage)
    assert stage.returncode == -signal.SIGINT and finished() < 16
    assert said.count("Traceback") == 1 and said.endswith("\nKeyboardInterrupt\n")


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    write_engine("tcp://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"engine\.scheduler is 'tcp://127\.0\.0\.1:1' and does"):
        run(names=["s00"])
