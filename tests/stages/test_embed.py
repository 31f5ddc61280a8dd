"""Embed: rows follow the patches, equal slides give equal bytes, a new slide costs one slide."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import embed
from stages.common import cache, encoders, stores
from stages.common.perslide import Job

PX = 31
SPEC = encoders.EncoderSpec(
    "test_vit", 24, 8, 3, "qkv", encoders.MEAN, encoders.STD, patch_px=PX, mpp=0.5
)
SETTINGS = embed.EmbedParams(encoders=("pretrained",), batch=3, central_crop=False)


def a_slide(source: Path, name: str, count: int, mpp: float = 0.5) -> None:
    rng = np.random.default_rng(ord(name))
    attributes = {"slide_id": name, "mpp": mpp, "slide_mpp": 0.25, "input": "-"}

    def make(folder: Path) -> None:
        patches = rng.integers(0, 256, (count, PX, PX, 3), dtype=np.uint8)
        origin = rng.integers(0, 10**5, (count, 2))
        stores.create_patches(folder / "patches.zarr", patches, origin, PX, attributes, "zstd")

    key = cache.key_of("tile", name, (str(count), str(mpp)), {}, "")
    cache.build("tile", key, name, {}, make)
    cache.link(cache.entry("tile", key), source / name)


def an_encoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    encoders.save(folder, encoders.build(SPEC), SPEC, {})
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    Path("params.yaml").write_text('engine:\n  workers: 1\n  scheduler: ""\n')
    embed._encoder.cache_clear()
    a_slide(tmp_path / "tile", "a", 7)
    an_encoder(tmp_path / "pretrained")
    return tmp_path


def a_job(data: Path, name: str = "a", batch: int = 3, central_crop: bool = False) -> Job:
    encoder = data / "pretrained"
    weights = encoders.digest_of(encoder)
    arguments = {
        "patches": data / "tile" / name / "patches.zarr",
        "encoder": encoder,
        "weights": weights,
        "batch": batch,
        "central_crop": central_crop,
    }
    return Job(name, ("tile", weights), arguments)


def made(data: Path, folder: str = "made", **job) -> stores.Bag:
    (data / folder).mkdir()
    embed.make(data / folder, a_job(data, **job))
    return stores.open_bag(data / folder / "bag.zarr")


def test_rows_follow_the_patches(data):
    bag = made(data)
    patches = stores.open_patches(data / "tile" / "a" / "patches.zarr")
    model, _ = encoders.load(data / "pretrained")
    assert bag.embedding.shape == (7, 64)
    assert np.array_equal(bag.origin, patches.origin)
    for row in range(7):
        pixels = torch.from_numpy(patches[row].copy())[None]
        with torch.no_grad():
            wanted = model(encoders.prepare(pixels, SPEC))[0].numpy()
        np.testing.assert_allclose(bag.embedding[row], wanted, rtol=1e-4, atol=1e-5)
    assert np.ptp(bag.embedding, axis=0).max() > 0.01


def test_equal_inputs_give_equal_bytes(data):
    first, second = (made(data, folder).embedding for folder in ("first", "second"))
    assert first.tobytes() == second.tobytes()
    files = sorted(path for path in (data / "first").rglob("*") if path.is_file())
    for file in files:
        other = data / "second" / file.relative_to(data / "first")
        assert file.read_bytes() == other.read_bytes()


def test_a_slide_without_patches_has_an_empty_bag(data):
    a_slide(data / "tile", "e", 0)
    assert made(data, name="e").embedding.shape == (0, 64)
    assert made(data, "two_scales", name="e", central_crop=True).crop.shape == (0, 64)


def test_the_second_scale_is_the_central_half_at_the_encoders_side(data):
    plain, bag = made(data, "plain"), made(data, "two_scales", central_crop=True)
    patches = stores.open_patches(data / "tile" / "a" / "patches.zarr")
    model, _ = encoders.load(data / "pretrained")
    assert plain.crop is None and np.array_equal(plain.embedding, bag.embedding)
    for row in range(7):
        pixels = torch.from_numpy(patches[row][8:23, 8:23].copy())[None]  # 15 of 31 px
        with torch.no_grad():
            wanted = model(encoders.prepare(pixels, SPEC))[0].numpy()
        np.testing.assert_allclose(bag.crop[row], wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(bag.crop - bag.embedding).max() > 0.01


@pytest.mark.parametrize(("px", "first", "last"), [(1, 0, 0), (2, 0, 1), (30, 7, 22), (32, 8, 23)])
def test_the_central_half_lies_in_the_middle(px, first, last):
    rows = torch.arange(px, dtype=torch.uint8).view(1, px, 1, 1).expand(1, px, px, 3)
    half = embed.central_half(rows)
    assert half.shape[1] == half.shape[2]
    assert (half[0, 0, 0, 0], half[0, -1, 0, 0]) == (first, last)


def test_asking_for_the_second_scale_makes_every_bag_anew(data):
    target, two_scales = data / "embed", dataclasses.replace(SETTINGS, central_crop=True)
    for settings, has_crop in ((SETTINGS, False), (two_scales, True), (SETTINGS, False)):
        embed.main(data / "tile", data / "pretrained", target, settings)
        assert (stores.open_bag(target / "a" / "bag.zarr").crop is not None) is has_crop


def test_rejects_a_crop_of_another_width(tmp_path):
    attributes = {"slide_id": "a", "mpp": 0.5, "slide_mpp": 0.25, "input": "-"}
    arrays = np.zeros((3, 5)), np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"crop is \(3, 4\): it must be as embedding \(3, 5\)"):
        stores.create_bag(tmp_path / "bag.zarr", *arrays, attributes, np.zeros((3, 4)))


def test_new_slide_costs_one_slide(data, caplog):
    caplog.set_level(logging.INFO)
    target = data / "embed"

    def run() -> str:
        caplog.clear()
        embed.main(data / "tile", data / "pretrained", target, SETTINGS)
        return next(record.message for record in caplog.records if "reused" in record.message)

    assert run() == "embed: 1 slides to make, 0 reused"
    a_slide(data / "tile", "b", 2)
    assert run() == "embed: 1 slides to make, 1 reused"
    assert [len(stores.open_bag(target / name / "bag.zarr").embedding) for name in "ab"] == [7, 2]
    assert run() == "embed: 0 slides to make, 2 reused"


def test_key_of_a_slide_follows_the_weights(data, monkeypatch):
    seen = []
    run = lambda *given, **_: seen.append(given[2][0].inputs) or []  # noqa: E731
    monkeypatch.setattr(embed.perslide, "run", run)
    for seed in (0, 1, 0):
        an_encoder(data / "pretrained", seed)
        embed.main(data / "tile", data / "pretrained", data / "embed", SETTINGS)
    assert seen[0] == seen[2] != seen[1]


def test_rejects_patches_of_another_resolution(data):
    a_slide(data / "tile", "m", 2, mpp=0.25)
    with pytest.raises(ValueError, match=r"slide m has patches of 31 px at 0\.25 mpp, and the"):
        made(data, name="m")


def test_says_what_to_run_where_something_is_missing(data):
    with pytest.raises(FileNotFoundError, match="run `dvc repro pretrain`"):
        embed.main(data / "tile", data / "untrained", data / "embed", SETTINGS)
    with pytest.raises(FileNotFoundError, match="run `dvc repro tile`"):
        embed.main(data / "absent", data / "pretrained", data / "embed", SETTINGS)


def test_rejects_an_empty_batch():
    with pytest.raises(ValueError, match=r"embed\.batch is 0: it must be 1 or more"):
        embed.EmbedParams(encoders=("pretrained",), batch=0, central_crop=False)
