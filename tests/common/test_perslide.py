import os
import re
from pathlib import Path

import pytest

from stages.common import cache, perslide
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


def test_makes_once_and_links_ever_after(caplog):
    caplog.set_level("INFO")
    run(jobs("a", "b"), depth=1)
    assert "toy: 2 slides to make, 0 reused" in caplog.text
    first = Path("data/toy/a/inner/value.txt")
    inode = first.stat().st_ino
    assert first.read_text() == "a ('digest',)"
    caplog.clear()
    run(jobs("a", "b", "c"), depth=1)
    assert "toy: 1 slides to make, 2 reused" in caplog.text
    assert first.stat().st_ino == inode  # a hard link: the disk holds it once
    run(jobs("c"), depth=1)
    assert sorted(path.name for path in Path("data/toy").iterdir()) == ["c"]


def test_what_is_in_place_stays_and_what_is_damaged_is_linked_anew():
    run(jobs("a", "b", "c"), depth=1)
    folder = Path("data/toy")
    kept = (folder / "a").stat().st_ino
    (folder / "b/inner/value.txt").unlink()
    (folder / "c/more.txt").write_text("not of this result")
    (folder / "metrics.json").write_text("{}")
    (folder / "gone").mkdir()
    run(jobs("a", "b", "c"), depth=1)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c"]
    assert (folder / "a").stat().st_ino == kept
    assert (folder / "b/inner/value.txt").read_text() == "b ('digest',)"
    assert not (folder / "c/more.txt").exists()
    run(jobs("a", "b", "c", inputs=("other",)), depth=1)
    assert (folder / "a/inner/value.txt").read_text() == "a ('other',)"


def test_a_run_that_fails_leaves_nothing_that_looks_whole():
    run(jobs("a"), depth=1)
    with pytest.raises(ValueError, match="1 of 2 slides failed"):
        run(jobs("a", bad="raise"), depth=1)
    assert not Path("data/toy").exists()


def worker_numbers() -> list[str]:
    return sorted(path.read_text() for path in Path("data/toy").glob("*/worker.txt"))


def test_workers_are_numbered():
    names = [f"s{number}" for number in range(8)]
    run([Job(name, (), {"wait": 0.2}) for name in names])
    assert set(worker_numbers()) == {"0", "1"}


def test_the_list_of_results_changes_with_any_of_them():
    """What later stages depend on, in the place of the results themselves."""

    def listed(work: list[Job]) -> list[str]:
        run(work, "stop")
        return Path("data/toy/results.csv").read_text().splitlines()

    first = listed(jobs("b", "a"))
    assert listed(jobs("a", "b")) == first
    assert first[0] == "slide_id,key" and [line.split(",")[0] for line in first[1:]] == ["a", "b"]
    for line in first[1:]:
        assert cache.entry("toy", line.split(",")[1]).is_dir()
    changed = listed([*jobs("a"), *jobs("b", inputs=("other",))])
    assert changed[:2] == first[:2] and changed[2] != first[2]
    assert listed(jobs("a")) == first[:2]


def test_the_bar_counts_work(capfd):
    with pytest.raises(ValueError, match="1 of 3 slides failed"):
        run([Job("a", (), {"wait": 0.3}, 30), Job("b", (), {"wait": 0.6}, 12), *jobs(bad="raise")])
    shown = capfd.readouterr().err
    last = re.search(r"100%.*3/3 slides, (\S+) slides/s, (\S+) rows/s, 1 failed \[.*<00:00", shown)
    assert last and float(last[2]) == pytest.approx(float(last[1]) * 21, rel=0.01)


def test_the_bar_counts_what_a_result_is_found_to_hold(capfd):
    names = ["a", "b", "c"]
    perslide.run(
        "toy",
        toy.make,
        jobs(*names),
        Path("data/toy"),
        code=CODE,
        settings={},
        unit="letters",
        count=lambda folder: len((folder / "inner/value.txt").read_text()),
    )
    last = re.search(r"3/3 slides, (\S+) slides/s, (\S+) letters/s", capfd.readouterr().err)
    assert float(last[2]) == pytest.approx(float(last[1]) * len("a ('digest',)"), rel=0.01)


def test_input_settings_and_slide_id_decide_and_going_back_is_free():
    run(jobs("a"), depth=1)
    run(jobs("a"), depth=2)
    run(jobs("a", inputs=("other",)), depth=1)
    assert made() == 3
    run(jobs("a"), depth=1)
    assert made() == 3
    assert Path("data/toy/a/inner/value.txt").read_text() == "a ('digest',)"


def test_results_are_read_only_and_described():
    run(jobs("a"))
    folder = Path("data/toy/a")
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.rglob("*") if path.is_file())
    said = cache.describe(folder)
    assert said["slide_id"] == "a" and said["inputs"] == ["digest"] and said["stage"] == "toy"


def test_pictures_do_not_count_as_content():
    run(jobs("a"), depth=1)
    before = cache.content(Path("data/toy/a"))
    run(jobs("a"), depth=2)
    assert cache.content(Path("data/toy/a")) == before


def test_sweeps_what_a_killed_process_left(tmp_path):
    run(jobs("a"))
    host = os.uname().nodename
    dead = cache.root() / "toy" / "ab" / f"{'a' * 64}.{host}.4194399.tmp"
    alive = cache.root() / "toy" / "ab" / f"{'a' * 64}.{host}.{os.getpid()}.tmp"
    dead.mkdir(parents=True)
    alive.mkdir()
    cache.sweep("toy")
    assert not dead.exists() and alive.exists()


def test_pulled_outputs_refill_the_cache(tmp_path, monkeypatch):
    run(jobs("a", "b"), depth=1)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "elsewhere"))
    assert cache.import_outputs() == 2
    assert made() == 2
    assert cache.import_outputs() == 0


def test_import_refuses_a_damaged_result(tmp_path, monkeypatch):
    run(jobs("a"))
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "elsewhere"))
    file = Path("data/toy/a/inner/value.txt")
    file.unlink()
    file.write_text("cut")
    with pytest.raises(ValueError, match="data/toy/a is damaged: delete it and run `dvc checkout`"):
        cache.import_outputs()
    assert made() == 0


def test_refuses_workers_below_zero(tmp_path):
    (tmp_path / "params.yaml").write_text('engine:\n  workers: -1\n  scheduler: ""\n')
    with pytest.raises(ValueError, match=r"engine\.workers is -1"):
        run(jobs("a"))


def test_import_refuses_a_key_that_leaves_the_cache(tmp_path):
    folder = Path("data/toy/a")
    folder.mkdir(parents=True)
    (folder / "made.json").write_text('{"stage": "toy", "key": "../../etc", "content": "c"}')
    with pytest.raises(ValueError, match="names stage 'toy', key '../../etc'"):
        cache.import_outputs()


def test_the_cache_is_found_from_a_temporary_copy(tmp_path, monkeypatch):
    monkeypatch.delenv("CYTOSSL_CACHE")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    assert cache.root() == tmp_path / "parent" / ".cytossl"


def test_content_of_an_unfinished_result_is_an_error():
    with pytest.raises(FileNotFoundError, match="run `dvc repro toy` first"):
        cache.content(Path("data/toy/a"))
