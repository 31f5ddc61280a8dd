"""Room on the disk: real file systems of a few megabytes, filled by the real per-slide map."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.common import cache, disk, perslide
from stages.common.disk import Needs
from stages.common.perslide import Job

SLIDE_BYTES = 400_000


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """A disk of 1 MiB that holds the cache; data/ is on another one."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or mount(place, "size=1m", "-t", "tmpfs", "tmpfs"):
        pytest.skip("no right to mount a file system in memory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(place / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (tmp_path / "params.yaml").write_text('engine:\n  workers: 1\n  scheduler: ""\n')
    yield place
    subprocess.run(["umount", str(place)], check=True)


def mount(place: Path, options: str, *how: str) -> int:
    command = ["mount", *how, "-o", options, str(place)]
    return subprocess.run(command, capture_output=True).returncode


def make(folder: Path, job: Job) -> None:
    (folder / "store.bin").write_bytes(os.urandom(SLIDE_BYTES))


def run(names: str, needs: float = 0.0, firm: bool = True) -> None:
    code = ("stages.common.jpeg",)
    told = {"needs": lambda jobs: Needs(needs * len(jobs), "lower toy.patches", firm)}
    jobs = [Job(name, ("digest",)) for name in names]
    perslide.run("toy", make, jobs, Path("data/toy"), code=code, settings={}, **told)


def kept() -> list[str]:
    return sorted(path.parent.name for path in (cache.root() / "toy").glob("*/*/made.json"))


def test_a_stage_does_not_begin_what_the_disk_cannot_hold(small_disk):
    run("a", needs=SLIDE_BYTES)
    with pytest.raises(OSError, match=r"toy has about 800 kB to write, and the disk of .*small"):
        run("abc", needs=SLIDE_BYTES)  # what is there already is not counted
    assert len(kept()) == 1 and Path("data/toy/a/store.bin").exists()


def test_a_bound_that_may_be_far_off_is_told_and_refuses_nothing(small_disk, caplog):
    run("a", needs=1e9, firm=False)
    assert "toy has about 1.0 GB to write at most" in caplog.text
    assert len(kept()) == 1


def test_a_disk_that_fills_up_costs_no_finished_slide(small_disk, caplog):
    caplog.set_level("INFO")
    with pytest.raises(OSError, match="No space left on device.*small/cache") as full:
        run("abcd")
    assert full.value.errno == errno.ENOSPC
    finished = kept()
    assert len(finished) == 2
    assert not list((cache.root() / "toy").glob("*/*.tmp"))
    caplog.clear()
    assert not mount(small_disk, "remount,size=4m")
    run("abcd", needs=SLIDE_BYTES)
    assert "toy: 2 slides to make, 2 reused" in caplog.text
    assert set(finished) < set(kept()) and len(kept()) == 4
    assert len(list(Path("data/toy").glob("*/store.bin"))) == 4


def test_both_disks_are_looked_at(small_disk, tmp_path, monkeypatch):
    assert disk.places(tmp_path / "data/tile") == [cache.root(), tmp_path / "data/tile"]
    assert disk.places(small_disk / "data/tile") == [cache.root()]
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="small/data/tile has .* free: free some, set CYTOSSL_CACHE"):
        disk.check("tile", Needs(2e6, "lower tile.patches_per_slide"), small_disk / "data/tile")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (12_345_678, "12 MB"), (3e12, "3.0 TB")],
)
def test_bytes_read_well(count, text):
    assert disk.human(count) == text
