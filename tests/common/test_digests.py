"""What was found out about files is remembered until they change."""

from pathlib import Path

import pytest

from stages.common import digests


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "slide.tif"
    path.write_bytes(b"first")
    return path


def asked(files: list[Path], question: str = "mpp") -> bool:
    """Whether the answer was looked for."""
    looked = []

    def answer() -> str:
        looked.append(1)
        return f"{question}: {len(files)}"

    assert digests.once(files, question, answer) == f"{question}: {len(files)}"
    return bool(looked)


def test_an_answer_is_found_once_for_the_same_files_and_question(file):
    other = file.with_name("companion.dat")
    other.touch()
    assert asked([file]) and not asked([file])
    assert asked([file], "extent") and not asked([file], "extent")
    assert asked([file, other]) and not asked([file, other])
    file.write_bytes(b"second")
    assert asked([file]) and asked([file, other])


def test_a_file_that_is_gone_is_looked_at_again(file):
    asked([file])
    file.unlink()
    assert asked([file]) and asked([file])


def test_an_error_is_not_remembered(file):
    def fail() -> str:
        raise ValueError("slide slide.tif is damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            digests.once([file], "mpp", fail)
    assert asked([file])


def test_digests_follow_the_content_and_the_order(file):
    other = file.with_name("b.dat")
    other.write_bytes(b"other")
    first = digests.digest_of([file])
    assert digests.digest_of([file]) == first != digests.digest_of([other])
    assert digests.digest_of([file, other]) != digests.digest_of([other, file])
    file.write_bytes(b"2nd")
    assert digests.digest_of([file]) != first
