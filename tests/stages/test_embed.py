"""Embed: rows follow the patches, equal slides give equal bytes, a new slide costs one slide."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import embed
from stages.common import encoders, stores
from stages.common.perslide import Job
from tests.common.stored import PX, a_slide

SPEC = encoders.EncoderSpec(
    "test_vit", 24, 8, 3, "qkv", encoders.MEAN, encoders.STD, patch_px=PX, mpp=0.5
)
SETTINGS = embed.EmbedParams(("pretrained",), 3, central_crop=False, autocast="none", device="cpu")


def an_encoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    encoders.save(folder, encoders.build(SPEC), SPEC, {})
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    Path("params.yaml").write_text('engine:\n  workers: 1\n  scheduler: ""\n')
    embed._network.cache_clear()
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
        "autocast": "none",
        "device": "cpu",
    }
    return Job(name, ("tile", weights), arguments)


def made(data: Path, folder: str = "made", **job) -> stores.Bag:
    (data / folder).mkdir()
    embed.make_many([data / folder], [a_job(data, **job)])
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


def test_bytes_do_not_depend_on_the_slides_beside_it(data):
    a_slide(data / "tile", "b", 5)
    made(data, "alone")
    folders = [data / "together" / name for name in "ba"]
    for folder in folders:
        folder.mkdir(parents=True)
    embed.make_many(folders, [a_job(data, name) for name in "ba"])
    assert len(stores.open_bag(folders[0] / "bag.zarr").embedding) == 5
    for file in ("embedding/c.0.0", "origin/c.0.0", "zarr.json", "embedding/zarr.json"):
        one, other = (folder / "bag.zarr" / file for folder in (data / "alone", folders[1]))
        assert one.read_bytes() == other.read_bytes()


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


def test_what_decides_the_bytes_is_in_the_key(data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        embed.perslide, "run", lambda *_, settings, **__: seen.append(settings) or []
    )
    monkeypatch.setattr(embed.devices, "count", lambda: 2)
    changes = ({}, {"batch": 4}, {"central_crop": True}, {"autocast": "bf16"}, {"device": "cuda"})
    for change in changes:
        settings = dataclasses.replace(SETTINGS, **change)
        embed.main(data / "tile", data / "pretrained", data / "embed", settings)
    assert all(one not in seen[:at] for at, one in enumerate(seen))


@pytest.mark.parametrize(
    ("device", "told"), [("cpu", ("cpu", 1)), ("cuda", ("cuda", 3)), ("auto", ("cuda", 3))]
)
def test_slides_share_batches_on_gpus_of_their_own(data, monkeypatch, device, told):
    """Five slides of 7 patches, batches of 3: eight batches hold more than half of the slides."""
    seen = []
    run = lambda *_, device, together, **__: seen.append((device, together)) or []  # noqa: E731
    monkeypatch.setattr(embed.perslide, "run", run)
    monkeypatch.setattr(embed.devices, "count", lambda: 2)
    for name in "bcde":
        a_slide(data / "tile", name, 7)
    settings = dataclasses.replace(SETTINGS, device=device)
    embed.main(data / "tile", data / "pretrained", data / "embed", settings)
    assert seen == [told]


@pytest.mark.parametrize(
    ("count", "most", "even"), [(0, 5, 1), (1, 5, 1), (5, 5, 5), (6, 5, 3), (25, 20, 13)]
)
def test_batches_of_a_slide_are_even(count, most, even):
    assert embed._even(count, most) == even


def test_refuses_embeddings_that_are_not_finite(data, monkeypatch):
    original = embed.embedding.embed

    def spoiled(*given):
        for rows in original(*given):
            rows[0, 5, 1] = np.nan
            yield rows

    monkeypatch.setattr(embed.embedding, "embed", spoiled)
    with pytest.raises(ValueError, match=r"slide a: the embedding of patch 5 is not finite \(1 of"):
        made(data)


def test_rejects_a_crop_of_another_width(tmp_path):
    attributes = {"slide_id": "a", "mpp": 0.5, "slide_mpp": 0.25, "input": "-"}
    arrays = np.zeros((3, 5)), np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"crop is \(3, 4\): it must be as embedding \(3, 5\)"):
        stores.create_bag(tmp_path / "bag.zarr", *arrays, attributes, np.zeros((3, 4)))


def test_a_new_slide_or_encoder_costs_only_that(data, caplog):
    caplog.set_level(logging.INFO)

    def run(encoder: str = "pretrained") -> str:
        caplog.clear()
        embed.main(data / "tile", data / encoder, data / "embed" / encoder, SETTINGS)
        return next(record.message for record in caplog.records if "reused" in record.message)

    assert run() == "embed: 1 slides to make, 0 reused"
    a_slide(data / "tile", "b", 2)
    assert run() == "embed: 1 slides to make, 1 reused"
    an_encoder(data / "other", seed=1)
    assert run("other") == "embed: 2 slides to make, 0 reused"
    assert run() == run("other") == "embed: 0 slides to make, 2 reused"
    for encoder in ("pretrained", "other"):
        bags = [stores.open_bag(data / "embed" / encoder / name / "bag.zarr") for name in "ab"]
        assert [len(bag.embedding) for bag in bags] == [7, 2]
    assert not np.allclose(*(made_by(data, encoder) for encoder in ("pretrained", "other")))


def made_by(data: Path, encoder: str) -> np.ndarray:
    return stores.open_bag(data / "embed" / encoder / "a" / "bag.zarr").embedding


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
        dataclasses.replace(SETTINGS, batch=0)
