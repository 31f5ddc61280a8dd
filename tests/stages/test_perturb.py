"""Perturb: which nuclei stay, where they lie in the patch, and what happens to the pixels."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cytossl_core.perturbation import perturb as shuffle
from stages import perturb
from stages.common import cache, failures, stores
from stages.common.perslide import Job

PX, MPP, SLIDE_MPP = 61, 0.5, 0.25
SETTINGS = perturb.PerturbParams(store="pixels", enabled=True, retain_share=0.5, radius_um=4.0)
PARAMS = """
seed: 3
sparse_topk: 0
irpe: none
engine: {workers: 1, scheduler: ""}
perturb: {store: pixels, enabled: %s, retain_share: 0.5, radius_um: 4.0}
"""


def a_slide(data: Path, name: str, nuclei: list[list[tuple[float, float]]]) -> None:
    """A finished tile and detect result; `nuclei` gives (x, y) in patch pixels for each patch."""
    rng = np.random.default_rng(0)
    origin = np.arange(len(nuclei))[:, None] * 1000 + np.array([[70_000, 300]])
    points = np.array([point for mine in nuclei for point in mine]).reshape(-1, 2)
    rows = np.repeat(np.arange(len(nuclei)), [len(mine) for mine in nuclei])
    shared = {"slide_id": name, "mpp": MPP, "slide_mpp": SLIDE_MPP, "input": "-"}

    def tile(folder: Path) -> None:
        pixels = [rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8) for _ in nuclei]
        stores.create_patches(folder / "patches.zarr", pixels, origin, PX, shared, "zstd")

    def detect(folder: Path) -> None:
        # Last patch first: the store promises no order of its rows.
        centroid = (points * MPP / SLIDE_MPP + origin[rows])[::-1]
        ones = np.ones(len(rows))
        stores.create_nuclei(folder / "nuclei.zarr", centroid, rows[::-1], ones, ones, shared)

    for stage, make in (("tile", tile), ("detect", detect)):
        key = cache.key_of(stage, name, (str(nuclei),), {}, "")
        cache.build(stage, key, name, {}, make)
        cache.link(cache.entry(stage, key), data / stage / name)


def a_job(data: Path, name: str, settings: perturb.PerturbParams, seed: int = 3) -> Job:
    return perturb._job(name, data / "tile" / name, data / "detect" / name, settings, seed)


def made(data: Path, name: str, settings=SETTINGS, seed: int = 3) -> stores.ViewStore:
    folder = data / f"made-{len(list(data.iterdir()))}"
    folder.mkdir()
    perturb.make(folder, a_job(data, name, settings, seed))
    return stores.open_views(folder / "views.zarr")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path / "data"


NUCLEI = [[(10.5, 20.25), (50.0, 3.0), (33.25, 40.5)], [], [(30.5, 30.5)], [(5.0, 5.0)] * 4]


def test_retains_half_of_each_patch_and_at_least_one(data):
    a_slide(data, "a", NUCLEI)
    views = made(data, "a")
    assert views.source.tolist() == [0, 2, 3]
    assert [len(views.points_of(at)) for at in range(3)] == [2, 1, 2]  # half of 3 is rounded up
    for at, row in enumerate(views.source):
        for point in views.points_of(at).tolist():
            assert tuple(point) in NUCLEI[row]
    assert views.attributes["patches_unused"] == 1


def test_keeps_the_discs_of_the_retained_nuclei_and_shuffles_the_rest(data):
    a_slide(data, "a", NUCLEI)
    views, patches = made(data, "a"), stores.open_patches(data / "tile/a/patches.zarr")
    radius_px = SETTINGS.radius_um / MPP
    centre = np.arange(PX) + 0.5
    shares = []
    for at, row in enumerate(views.source):
        near = np.zeros((PX, PX), bool)
        for x, y in views.points_of(at):
            near |= np.hypot(centre[None] - x, centre[:, None] - y) <= radius_px
        before, after = patches[row], views[at]
        assert np.array_equal(before[near], after[near])
        assert (before[~near] != after[~near]).any(-1).mean() > 0.95
        assert sorted(map(tuple, before[~near].tolist())) == sorted(
            map(tuple, after[~near].tolist())
        )
        shares.append(near.mean())
    assert views.attributes["pixels_kept"] == pytest.approx(np.mean(shares), rel=1e-12)
    assert 0 < views.attributes["pixels_kept"] < 0.2


def test_shuffle_is_the_core_one_with_the_chosen_seed(data):
    a_slide(data, "a", NUCLEI)
    patches = stores.open_patches(data / "tile/a/patches.zarr")
    found = stores.open_nuclei(data / "detect/a/nuclei.zarr")
    view = perturb.choose(patches, found, SETTINGS, 3)[1]
    image = torch.from_numpy(patches[view.source].copy()).permute(2, 0, 1)[None]
    points = torch.from_numpy(view.points)[None]
    expected = shuffle(image, points, 8.0, torch.tensor([view.seed]))[0].permute(1, 2, 0)
    assert np.array_equal(made(data, "a")[1], expected.numpy())


def test_a_patch_is_treated_alike_whatever_other_patches_hold(data):
    a_slide(data, "a", NUCLEI)
    first = made(data, "a")
    for stage in ("tile", "detect"):
        (data / stage / "a").rename(data / stage / "old")
    a_slide(data, "a", [NUCLEI[0], [(9.0, 9.0)], NUCLEI[2], NUCLEI[3]])
    second = made(data, "a")
    assert second.source.tolist() == [0, 1, 2, 3]
    for at, other in ((0, 0), (1, 2), (2, 3)):
        assert np.array_equal(first.points_of(at), second.points_of(other))
        assert np.array_equal(first[at], second[other])


def test_seed_and_slide_id_decide_the_draw(data):
    many = [[(float(x), float(y)) for x in range(5, 55, 9) for y in range(5, 55, 9)]]
    for name in ("a", "b"):
        a_slide(data, name, many)
    drawn = [made(data, "a"), made(data, "a"), made(data, "a", seed=4), made(data, "b")]
    points = [store.points_of(0).tobytes() for store in drawn]
    pixels = [store[0].tobytes() for store in drawn]
    assert points[0] == points[1] and pixels[0] == pixels[1]
    assert len(set(points)) == len(set(pixels)) == 3


def test_every_nucleus_is_retained_equally_often(data):
    a_slide(data, "a", [[(float(x), 9.0) for x in range(10)]])
    patches = stores.open_patches(data / "tile/a/patches.zarr")
    found = stores.open_nuclei(data / "detect/a/nuclei.zarr")
    counts = np.zeros(10)
    for seed in range(1000):
        counts[perturb.choose(patches, found, SETTINGS, seed)[0].points[:, 0].astype(int)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(1000 * 0.25)


def test_disabled_passes_every_patch_unchanged_without_points(data):
    a_slide(data, "a", NUCLEI)
    views = made(data, "a", perturb.PerturbParams("pixels", False, 0.5, 4.0))
    patches = stores.open_patches(data / "tile/a/patches.zarr")
    assert views.source.tolist() == [0, 1, 2, 3] and len(views.arrays["point"]) == 0
    assert all(np.array_equal(views[at], patches[at]) for at in range(4))
    assert views.attributes["pixels_kept"] == 1


def test_examples_show_the_original_beside_the_view(data):
    a_slide(data, "a", NUCLEI)
    views, patches = made(data, "a"), stores.open_patches(data / "tile/a/patches.zarr")
    sheet = cv2.imread(str(views.path.parent / "examples.jpg"))[..., ::-1].astype(int)
    side = perturb.EXAMPLE_PX
    assert sheet.shape == (2 * side, 4 * side, 3)  # 3 pairs, 2 a row
    for column, expected in enumerate([patches[0], views[0], patches[2], views[1]]):
        shown = sheet[:side, column * side : (column + 1) * side]
        resized = cv2.resize(expected, (side, side), interpolation=cv2.INTER_AREA)
        assert np.abs(shown - resized).mean() < 15  # other noise differs by 85
    assert sheet[side:, 2 * side :].mean() > 254


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_rejects_a_share_outside_its_range(share):
    with pytest.raises(ValueError, match="perturb.retain_share is .* above 0, up to 1"):
        perturb.PerturbParams("pixels", True, share, 12.5)


@pytest.mark.parametrize("radius_um", [0.0, -1.0, float("inf"), float("nan")])
def test_rejects_a_radius_outside_its_range(radius_um):
    with pytest.raises(ValueError, match="perturb.radius_um is .* above 0"):
        perturb.PerturbParams("pixels", True, 0.5, radius_um)


def test_stage_writes_views_and_metrics_and_one_empty_slide_is_fine(data):
    a_slide(data, "a", NUCLEI)
    a_slide(data, "b", [[], []])
    Path("params.yaml").write_text(PARAMS % "true")
    perturb.main()
    empty = stores.open_views(data / "perturb/b/views.zarr")
    assert len(empty) == 0 and len(stores.open_views(data / "perturb/a/views.zarr")) == 3
    metrics = json.loads((data / "perturb/metrics.json").read_text())
    kept = stores.open_views(data / "perturb/a/views.zarr").attributes["pixels_kept"]
    assert metrics == {
        "slides": 2,
        "views": 3,
        "points": 5,
        "patches_without_nuclei": 3,
        "pixels_kept": kept,
        "failed": 0,
    }


def test_slides_that_detect_left_out_are_left_out_and_no_others(data):
    for name in "ab":
        a_slide(data, name, NUCLEI)
    shutil.rmtree(data / "detect/b")
    Path("params.yaml").write_text(PARAMS % "true")
    with pytest.raises(
        FileNotFoundError, match="detect/b holds no finished result: run `dvc repro"
    ):
        perturb.main()
    failures.write(data / "detect", {"b": "its worker process died"})
    perturb.main()
    assert json.loads((data / "perturb/metrics.json").read_text())["slides"] == 1
    assert not (data / "perturb/b").exists() and failures.read(data / "perturb") == {}


def test_says_what_to_do_when_no_slide_has_a_nucleus(data):
    a_slide(data, "b", [[], []])
    Path("params.yaml").write_text(PARAMS % "true")
    with pytest.raises(ValueError, match="none of 1 slides has a nucleus .* perturb.enabled"):
        perturb.main()
    assert not (data / "perturb/metrics.json").exists()
