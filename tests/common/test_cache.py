"""What `arrange` leaves in place: results that are there, however their files are linked."""

import os
import shutil
from pathlib import Path

import pytest

from stages.common import cache

LARGE = cache.COMPARED_BYTES + 1


@pytest.fixture
def result(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    key = cache.key_of("toy", "a", (), {}, "")

    def make(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner/small.json").write_text("{}")
        (folder / "large.bin").write_bytes(bytes(LARGE))

    cache.build("toy", key, "a", {}, make)
    return cache.entry("toy", key)


def linked_anew(result: Path, target: Path, name: str) -> bool:
    """Whether `arrange` put a hard link in the place of a file that was none."""
    cache.arrange({"a": result}, target)
    return (target / "a" / name).samefile(result / name)


def replace(file: Path, content: bytes) -> None:
    """As DVC does it: another file takes the name."""
    other = file.with_name("other")
    other.write_bytes(content)
    os.replace(other, file)


def test_a_small_file_that_dvc_linked_to_an_equal_one_stays(result, tmp_path):
    target, name = tmp_path / "data", "inner/small.json"
    assert linked_anew(result, target, name)
    replace(target / "a" / name, b"{}")
    assert not linked_anew(result, target, name)
    replace(target / "a" / name, b"[]")
    assert linked_anew(result, target, name)


def test_a_copy_on_another_disk_stays_and_another_file_does_not(result, tmp_path):
    target, name = tmp_path / "data", "large.bin"
    shutil.copytree(result, target / "a")  # times are copied, links are not made
    assert not linked_anew(result, target, name)
    replace(target / "a" / name, bytes(LARGE))
    assert linked_anew(result, target, name)


@pytest.mark.parametrize("spoil", ["gone", "more", "link", "folder"])
def test_what_differs_is_put_there_anew(result, tmp_path, spoil):
    target = tmp_path / "data"
    cache.arrange({"a": result}, target)
    file = target / "a/inner/small.json"
    if spoil == "more":
        (target / "a/more.txt").touch()
    else:
        file.unlink()
    if spoil == "link":
        file.symlink_to(result / "inner/small.json")
    if spoil == "folder":
        file.mkdir()
    cache.arrange({"a": result}, target)
    assert file.is_file() and not file.is_symlink()
    assert not (target / "a/more.txt").exists()
