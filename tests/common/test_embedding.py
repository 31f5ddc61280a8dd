"""Embedding: the right rows of the right slide, whatever shares a batch; memory that runs out."""

import copy
import functools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.common import embedding, encoders, stores
from stages.common.embedding import Network, central_half, whole
from stages.common.spec import EncoderSpec
from tests.common.stored import PX, a_slide, opened

COUNTS = {"a": 7, "b": 0, "c": 1, "d": 11, "e": 3}
KINDS = {"test_vit": (24, 8, 3, "qkv"), "resnet10t": (40, 0, 0, "none")}
KINDS["vpu_cnn_384"] = KINDS["resnet10t"]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    for name, count in COUNTS.items():
        a_slide(tmp_path / "tile", name, count)
    return tmp_path / "tile"


@functools.cache
def a_network(kind: str = "test_vit", autocast: embedding.Autocast = "none") -> Network:
    spec = EncoderSpec(kind, *KINDS[kind], encoders.MEAN, encoders.STD, patch_px=PX, mpp=0.5)
    torch.manual_seed(0)
    return Network(encoders.build(spec), spec, "cpu", autocast)


def embedded(source: Path, names: str, network: Network, batch: int, parts=(whole,)):
    rows = embedding.embed(opened(source, names), network, batch, parts)
    return dict(zip(names, rows, strict=True))


def one_by_one(source: Path, name: str, network: Network, part=whole) -> np.ndarray:
    (store,) = opened(source, name)
    found = []
    for row in range(len(store)):
        patch = torch.from_numpy(store[row].copy())[None]
        with torch.no_grad():
            found.append(network.model(encoders.prepare(part(patch), network.spec))[0].numpy())
    return np.array(found).reshape(len(store), network.dim)


@pytest.mark.parametrize("batch", [1, 5, 22, 64])
def test_rows_follow_slides_and_patches(source, batch):
    network, parts = a_network(), (whole, central_half)
    found = embedded(source, "abcde", network, batch, parts)
    for name, count in COUNTS.items():
        assert found[name].shape == (2, count, network.dim)
        for rows, part in zip(found[name], parts, strict=True):
            wanted = one_by_one(source, name, network, part)
            np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-5)
    assert np.ptp(found["a"], axis=1).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_slide_by_itself_has_the_same_bits_each_time_and_nearly_those_amid_others(source, kind):
    network = a_network(kind)
    alone = embedded(source, "a", network, 5)["a"]
    assert embedded(source, "a", network, 5)["a"].tobytes() == alone.tobytes()
    for names in ("abcde", "ca", "ea", "cea"):  # it begins at the places 0, 1, 3 and 4 of a batch
        found = embedded(source, names, network, 5)["a"]
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_nearly_the_same_and_itself_always_the_same(source, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, parts = a_network.__wrapped__(kind), (whole, central_half)
    there = Network(copy.deepcopy(here.model), here.spec, "cuda")
    wanted, found, again = (
        embedded(source, "abcde", network, 5, parts) for network in (here, there, there)
    )
    for name in COUNTS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4)
        assert found[name].tobytes() == again[name].tobytes()


def test_16_bits_give_nearly_the_same_numbers(source):
    exact = embedded(source, "d", a_network("resnet10t"), 4)["d"]
    for autocast in ("bf16", "fp16"):
        found = embedded(source, "d", a_network("resnet10t", autocast), 4)["d"]
        assert found.dtype == np.float32 and not np.array_equal(found, exact)
        assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < 0.02


def test_each_patch_is_read_once_for_both_scales(source, monkeypatch):
    read = []
    original = stores.PatchStore.__getitem__
    spy = lambda store, at: read.append((store.path.parent.name, at)) or original(store, at)  # noqa: E731
    monkeypatch.setattr(stores.PatchStore, "__getitem__", spy)
    embedded(source, "ad", a_network(), 5, (whole, central_half))
    assert sorted(read) == [(name, row) for name in "ad" for row in range(COUNTS[name])]


@pytest.mark.parametrize(("px", "first", "last"), [(1, 0, 0), (2, 0, 1), (30, 7, 22), (32, 8, 23)])
def test_the_central_half_lies_in_the_middle(px, first, last):
    rows = torch.arange(px, dtype=torch.uint8).view(1, px, 1, 1).expand(1, px, px, 3)
    half = central_half(rows)
    assert half.shape[1] == half.shape[2]
    assert (half[0, 0, 0, 0], half[0, -1, 0, 0]) == (first, last)


class Small(torch.nn.Module):
    """Torch's own error above so many images; else the mean of each of their channels."""

    num_features = 3

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.tried = fits, []

    def forward(self, images):
        self.tried.append(len(images))
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return images.mean((2, 3))


def test_halves_the_batch_when_memory_runs_out_and_says_so_once(source, caplog):
    caplog.set_level(logging.WARNING)
    spec = a_network("resnet10t").spec
    wanted = embedded(source, "ad", Network(Small(99), spec, "cpu"), 13)
    network = Network(Small(fits=3), spec, "cpu")
    for _ in range(2):
        found = embedded(source, "ad", network, 13)
        assert all(np.array_equal(found[name], wanted[name]) for name in "ad")
    assert network.model.tried == [13, 6] + 4 * [3, 3, 3, 3, 1]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "13 patches at once do not fit the memory of cpu: going on with 3; set embed.b" in said


def test_one_patch_too_many_and_other_errors_end_it(source):
    network = Network(Small(fits=0), a_network().spec, "cpu")
    with pytest.raises(ValueError, match=r"one patch does not fit the memory of cpu with an enc"):
        embedded(source, "a", network, 4)
    network.model.forward = lambda images: images @ images[:, :2]
    with pytest.raises(RuntimeError, match="[Ss]ize|shape"):
        embedded(source, "a", network, 4)
