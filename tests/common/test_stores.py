import numpy as np
import pytest
import zarr

from stages.common import stores
from stages.common.shards import ShardReader, write_shard

ATTRIBUTES = {"slide_id": "a", "mpp": 0.5, "slide_mpp": 0.25, "input": "d"}


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
@pytest.mark.parametrize("count", [1, 7, 517])
def test_our_reader_and_zarr_read_the_same(tmp_path, codec, count):
    patches, origins = noise(count, 13), np.arange(2 * count).reshape(count, 2)
    stores.create_patches(tmp_path / "p.zarr", iter(patches), origins, 13, ATTRIBUTES, codec)
    store = stores.open_patches(tmp_path / "p.zarr")
    ours = np.stack([store[at] for at in range(len(store))])
    judge = zarr.open_group(tmp_path / "p.zarr", mode="r")
    assert np.array_equal(ours, judge["patch"][:])
    assert np.array_equal(store.origin, origins)
    if codec == "zstd":
        assert np.array_equal(ours, patches)
    else:
        assert np.abs(ours.astype(int) - patches).mean() < 8  # noise is JPEG's worst case


def test_same_input_same_bytes(tmp_path):
    for name in "ab":
        stores.create_patches(tmp_path / name, iter(noise(5, 11)), np.zeros((5, 2)), 11, ATTRIBUTES)
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in "ab"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_few_files_a_slide(tmp_path):
    stores.create_patches(tmp_path / "p", iter(noise(100, 8)), np.zeros((100, 2)), 8, ATTRIBUTES)
    assert sum(path.is_file() for path in (tmp_path / "p").rglob("*")) <= 6


def test_views_know_their_points(tmp_path):
    points = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)
    index, source = np.array([0, 2, 2]), np.array([4, 7, 9])
    path = tmp_path / "v.zarr"
    stores.create_views(path, iter(noise(3, 7)), points, index, source, 7, ATTRIBUTES)
    store = stores.open_views(path)
    assert np.array_equal(store.points_of(2), points[1:])
    assert store.points_of(1).shape == (0, 2)
    assert np.array_equal(store.source, source)
    assert np.array_equal(store[1], noise(3, 7)[1])


def test_nuclei_and_bags_come_back(tmp_path):
    centroid = np.array([[1.5, 2.5]], dtype=np.float32)
    arrays = (centroid, np.array([3]), np.array([4.5]), np.array([0.5]))
    stores.create_nuclei(tmp_path / "n", *arrays, ATTRIBUTES)
    nuclei = stores.open_nuclei(tmp_path / "n")
    assert nuclei.centroid.dtype == np.float32 and nuclei.patch_index.dtype == np.int64
    assert nuclei.attributes["slide_mpp"] == 0.25
    embedding = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    stores.create_bag(tmp_path / "b", embedding, np.zeros((3, 2)), ATTRIBUTES)
    assert np.array_equal(stores.open_bag(tmp_path / "b").embedding, embedding)


def test_empty_stores_open(tmp_path):
    stores.create_nuclei(tmp_path / "n", np.zeros((0, 2)), *[np.zeros(0)] * 3, ATTRIBUTES)
    assert len(stores.open_nuclei(tmp_path / "n").centroid) == 0
    empty = (np.zeros((0, 2)), np.zeros(0), np.zeros(0))
    stores.create_views(tmp_path / "v", iter([]), *empty, 7, ATTRIBUTES)
    assert len(stores.open_views(tmp_path / "v")) == 0


def test_opening_says_what_differs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*none.zarr"):
        stores.open_bag(tmp_path / "none.zarr")
    stores.create_bag(tmp_path / "b", np.zeros((3, 5)), np.zeros((3, 2)), ATTRIBUTES)
    with pytest.raises(ValueError, match="has no array patch"):
        stores.open_patches(tmp_path / "b")
    group = zarr.open_group(tmp_path / "b")
    group.attrs["schema"] = 99
    with pytest.raises(ValueError, match="has schema 99: this version reads 2"):
        stores.open_bag(tmp_path / "b")


def test_refuses_wrong_patches(tmp_path):
    with pytest.raises(ValueError, match="it must be uint8 of 9 px"):
        stores.create_patches(tmp_path / "a", iter(noise(2, 8)), np.zeros((2, 2)), 9, ATTRIBUTES)
    with pytest.raises(ValueError, match="was given 2 patches or more: it needs 3"):
        stores.create_patches(tmp_path / "b", iter(noise(2, 8)), np.zeros((3, 2)), 8, ATTRIBUTES)
    with pytest.raises(ValueError, match="was given 1 patches or more: it needs 1"):
        stores.create_patches(tmp_path / "c", iter(noise(2, 8)), np.zeros((1, 2)), 8, ATTRIBUTES)
    with pytest.raises(ValueError, match="has no attribute slide_mpp"):
        stores.create_bag(
            tmp_path / "d", np.zeros((1, 1)), np.zeros((1, 2)), {"slide_id": "a", "mpp": 1}
        )


def test_a_damaged_shard_is_told(tmp_path):
    path = tmp_path / "shard"
    assert write_shard(path, iter([b"one", b"three"]), 4) == 2
    reader = ShardReader(path, 4)
    assert (reader[0], reader[1]) == (b"one", b"three")
    with pytest.raises(IndexError, match="no chunk 2"):
        reader[2]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged: delete it and rerun"):
        ShardReader(path, 4)
