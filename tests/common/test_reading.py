"""Reading ahead: every patch once and in order, no thread left behind, damage that is named."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from stages.common import cache, reading, stores
from tests.common.stored import PX, a_slide, opened


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    for name, count in (("a", 7), ("b", 0), ("c", 4)):
        a_slide(tmp_path / "tile", name, count, codec="jpeg")
    return tmp_path / "tile"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 11, 12])
def test_every_patch_once_and_in_order(source, batch, threads):
    slides = opened(source, "abc")
    found = [pixels.numpy() for pixels in reading.batches(slides, batch, threads)]
    assert {pixels.shape for pixels in found} == {(batch, PX, PX, 3)}
    joined = np.concatenate(found)
    wanted = np.stack([slide[row] for slide in slides for row in range(len(slide))])
    assert np.array_equal(joined[:11], wanted) and not joined[11:].any()
    assert len(found) == -(-11 // batch)


def test_no_patches_no_batch(source):
    assert not list(reading.batches(opened(source, "b"), 3, 1))


def test_reads_ahead_but_not_all(source, monkeypatch):
    read = []
    original = stores.PatchStore.__getitem__
    spy = lambda store, at: read.append(at) or original(store, at)  # noqa: E731
    monkeypatch.setattr(stores.PatchStore, "__getitem__", spy)
    given = reading.batches(opened(source, "a"), 1, 1)
    next(given)
    given.close()  # waits for what has begun
    assert 1 <= len(read) <= 1 + reading.AHEAD
    assert not [one for one in threading.enumerate() if "ThreadPool" in one.name]


@pytest.mark.parametrize("harm", ["cut", "scribbled", "gone"])
def test_a_damaged_shard_names_slide_patch_and_remedy(source, harm):
    (store,) = opened(source, "a")
    file = store.path / "patch" / "c.0.0.0.0"
    data = bytearray(file.read_bytes())
    file.chmod(0o644)
    if harm == "cut":
        file.write_bytes(data[:-99])
    elif harm == "scribbled":
        first = int.from_bytes(data[-116:-108], "little")  # 7 pairs and a checksum: the index
        data[first : first + 300] = bytes(300)
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(
        ValueError, match=r"slide a: patch 0 cannot be read from .*c\.0\.0\.0\.0 "
    ) as it:
        list(reading.batches([store], 3, 1))
    assert f"find . -samefile {file} -delete" in str(it.value)
    kept = cache.entry("tile", cache.describe(store.path.parent)["key"])
    assert f"delete {kept} and run `dvc repro --force --single-item tile`" in str(it.value)
    assert kept.is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(source):
    (store,) = opened(source, "a")
    (store.path / "patch" / "c.0.0.0.0").chmod(0)
    with pytest.raises(ValueError, match="slide a: patch 0 cannot be read .*Permission denied"):
        list(reading.batches([store], 3, 1))
