"""Slides that fail: who is left out, who is tried again, what is said, and what stops a stage."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from stages.common import cache, dispatch, failures, perslide
from stages.common.perslide import Job
from tests.common import toy

CODE = ("stages.common.stores",)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    (tmp_path / "params.yaml").write_text('engine:\n  workers: 2\n  scheduler: ""\n')


def jobs(*names: str, inputs: tuple[str, ...] = ("digest",), **failures: str) -> list[Job]:
    plain = [Job(name, inputs) for name in names]
    return plain + [Job(name, inputs, {"failure": how}) for name, how in failures.items()]


def run(work: list[Job], on_error: str = "", **settings: int) -> list[str]:
    return perslide.run(
        "toy",
        toy.make,
        work,
        Path("data/toy"),
        code=CODE,
        settings=settings,
        on_error=on_error,
        unit="rows",
    )


def made() -> int:
    return len(list((cache.root() / "toy").glob("*/*/made.json")))


def test_failures_name_the_slide_and_lose_nothing():
    with pytest.raises(ValueError, match="2 of 5 slides failed; the others are kept") as error:
        run(jobs("a", "b", "c", bad="raise", dead="kill"))
    text = str(error.value)
    assert "bad: slide bad is cut short" in text
    assert re.search("dead: its worker process died", text)
    assert made() == 3
    assert not list(cache.root().glob("toy/*/*.tmp"))
    assert run(jobs("a", "b", "c")) == ["a", "b", "c"]
    assert made() == 3


def test_quarantine_goes_on_without_the_slides_and_tries_them_again(caplog):
    elsewhere = {"text": f"no {Path.cwd()}/my slides/x.svs: restore it"}
    work = [*jobs("a", "b", bad="raise"), Job("lost", (), {"failure": "say", **elsewhere})]
    assert run(work, "quarantine") == ["a", "b"]
    assert "toy: 2 of 4 slides quarantined" in caplog.text
    assert sorted(os.listdir("data/toy")) == ["a", "b", "failed.csv", "results.csv"]
    errors = {"bad": "slide bad is cut short", "lost": "no x.svs: restore it"}
    assert failures.read(Path("data/toy")) == errors
    mended = [*jobs("a", "b", "bad"), work[-1]]
    assert run(mended, "quarantine") == ["a", "b", "bad"]
    assert list(failures.read(Path("data/toy"))) == ["lost"] and made() == 3
    assert run(mended[:3], "stop") == ["a", "b", "bad"]
    assert Path("data/toy/failed.csv").read_text().splitlines() == ["slide_id,error"]


def test_a_slide_that_vanished_is_no_bad_one_and_is_made_when_it_is_back():
    """Were the stage to go well, DVC would not run it again, and the slide be lost for good."""
    message = "toy: 1 of 4 slides vanished: run again when they are back; what was made is kept:"
    with pytest.raises(FileNotFoundError, match=f"{message}\n  bad: .*\n  gone: slide gone"):
        run(jobs("a", "b", bad="raise", gone="vanish"), "quarantine")
    assert made() == 2 and not Path("data/toy").exists()
    assert run(jobs("a", "b", "gone", bad="raise"), "quarantine") == ["a", "b", "gone"]
    assert made() == 3 and list(failures.read(Path("data/toy"))) == ["bad"]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("no /srv/my slides/x.svs: restore it", "no x.svs: restore it"),
        ("a (/srv/lab/CMU 1.svs) and b (/lab/c of d.svs) e", "a (CMU 1.svs) and b (c of d.svs) e"),
        (
            "slides a b (copy of c.svs) have 1/2 or 3 / 4",
            "slides a b (copy of c.svs) have 1/2 or 3 / 4",
        ),
        ("no '/srv/O'Brien (old), new/x.svs' and '/srv/b.svs'", "no 'x.svs' and 'b.svs'"),
        ("moved /srv/a b/x.svs to /srv/c/y.svs, /srv/z.svs", "moved x.svs to y.svs, z.svs"),
        ("data/tile/a and s3://lab/x/y", "data/tile/a and s3://lab/x/y"),
    ],
)
def test_of_a_path_its_last_name_is_written_and_of_a_message_all(tmp_path, said, written):
    failures.write(tmp_path, {"a": said})
    assert failures.read(tmp_path) == {"a": written}


def test_quarantine_of_every_slide_is_a_failure():
    with pytest.raises(ValueError, match="2 of 2 slides failed"):
        run(jobs(bad="raise", worse="raise"), "quarantine")
    assert not Path("data/toy").exists()


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_a_full_disk_is_no_slides_fault_and_stops_the_stage_at_once(tmp_path, on_error):
    slow = [Job(f"s{number}", (), {"wait": 0.5}) for number in range(20)]
    with pytest.raises(OSError, match="No space left on device") as error:
        run([*jobs(full="full"), *slow], on_error)
    assert error.value.filename == str(tmp_path / "cache")
    assert made() < 5 and not Path("data/toy").exists()
    assert not list(cache.root().glob("toy/*/*.tmp"))


def test_what_may_pass_is_tried_again_and_no_more_than_asked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "PAUSE_SECONDS", 0.1)
    journal = {"journal": str(tmp_path / "journal"), "mark": str(tmp_path / "mark")}
    kinds = {"a": None, "once": "away once", "ever": "away", "bad": "raise"}
    work = [Job(name, (), {**journal, "failure": how}) for name, how in kinds.items()]
    with pytest.raises(ValueError, match="2 of 4 slides failed") as error:
        run(work)
    assert "ever: [Errno 116] Stale file handle" in str(error.value)
    assert "once: [Errno 116] Stale file handle: 'slides/x.svs'; tried again" in caplog.text
    begun = Counter((tmp_path / "journal").read_text().split())
    assert begun == {"a": 1, "once": 2, "ever": 2, "bad": 1}


def test_groups_are_made_together_and_blamed_one_by_one(tmp_path):
    kinds = {name: None for name in "abcdefg"} | {"c": "raise", "f": "kill"}
    journal = {"journal": str(tmp_path / "journal")}
    work = [Job(name, (), {**journal, "failure": how}) for name, how in kinds.items()]
    together = {"together": 3, "code": CODE, "settings": {}, "on_error": "quarantine"}
    good = perslide.run("toy", toy.make_many, work, Path("data/toy"), **together)
    assert "".join(good) == "abdeg"
    assert list(failures.read(Path("data/toy"))) == ["c", "f"]
    assert Path("data/toy/d/inner/value.txt").read_text() == "d ()"
    begun = Counter((tmp_path / "journal").read_text().splitlines())
    singles = {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 3}
    assert begun == {"a b c": 1, "d e f": 1, "g": 1, **singles}
