import json
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import yaml

from stages import tile
from stages.common import cache, cohort, coverage, embedding, failures, slides, stores
from stages.common.perslide import Job
from stages.tile import TileParams

PARAMS = TileParams(
    mpp=0.5,
    patch_px=64,
    sampling="random",
    patches_per_slide=5,
    stride_px=64,
    central=False,
    foreground="nuclei",
    foreground_od=0.08,
    foreground_um2=12.0,
    foreground_blur_um=2.0,
    codec="zstd",
)
SIDE = 1280  # level-0 pixels at 0.25 mpp: ten by ten patches of 64 px at 0.5 mpp
CELLS = [(100, 100), (700, 300), (1216, 960)]  # centres, level-0 pixels


def paint(path: Path, cells: list[tuple[int, int]] = CELLS) -> Path:
    """Pale background, wide pink cytoplasm, small dark nuclei."""
    pixels = np.full((SIDE, SIDE, 3), (244, 243, 240), np.uint8)
    for centre in cells:
        cv2.circle(pixels, centre, 60, (225, 150, 170), -1)
        cv2.circle(pixels, centre, 16, (70, 50, 110), -1)
    header = "Aperio\n|AppMag = 40|MPP = 0.25"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            description=header,
            metadata=None,
        )
    return path


def row(path: Path, slide_id: str = "s") -> cohort.SlideRow:
    return cohort.SlideRow(slide_id, str(path), "a", "p", "train", "0.25", "digest")


def make(folder: Path, path: Path, slide_id: str = "s", seed: int = 0, **changes) -> Path:
    settings = replace(PARAMS, **changes)
    arguments = {"row": row(path, slide_id), "params": settings, "seed": seed}
    folder.mkdir()
    tile.make(folder, Job(slide_id, ("digest",), arguments))
    return folder / "patches.zarr"


def test_random_takes_the_patches_with_nuclei_and_no_cytoplasm(tmp_path):
    store = stores.open_patches(make(tmp_path / "out", paint(tmp_path / "s.svs")))
    holding = {(x // 128 * 128, y // 128 * 128) for x, y in CELLS}
    assert {tuple(map(int, corner)) for corner in store.origin} == holding
    assert store.attributes["mpp"] == 0.5 and store.attributes["slide_mpp"] == 0.25


def test_pixels_are_the_slides_at_the_mpp_asked_for(tmp_path):
    path = paint(tmp_path / "s.svs")
    store = stores.open_patches(make(tmp_path / "out", path))
    slide = slides.Slide(path)
    for at, (x0, y0) in enumerate(store.origin):
        whole = slide.read(int(x0), int(y0), 128, 128, 0.25)
        judge = whole.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(store[at] - judge).max() <= 1


def test_grid_steps_and_all_keeps_the_background(tmp_path):
    path = paint(tmp_path / "s.svs")
    dense = stores.open_patches(make(tmp_path / "a", path, sampling="all", patches_per_slide=0))
    assert len(dense) == 100
    assert np.array_equal(dense.origin[:3], [[0, 0], [128, 0], [256, 0]])
    changes = {"sampling": "grid", "stride_px": 32, "patches_per_slide": 0}
    sliding = stores.open_patches(make(tmp_path / "b", path, **changes))
    corners = sliding.origin
    assert (corners % 64 == 0).all() and len(corners) > 3
    centres = np.array(CELLS)
    inside = (corners[:, None] <= centres + 16) & (corners[:, None] + 128 >= centres - 16)
    assert inside.all(axis=2).any(axis=1).all()


def test_the_draw_depends_on_seed_and_slide_id_alone(tmp_path):
    everywhere = [(x, y) for x in range(64, SIDE, 128) for y in range(64, SIDE, 128)]
    path = paint(tmp_path / "s.svs", everywhere)

    def drawn(name: str, **changes: object) -> np.ndarray:
        return stores.open_patches(make(tmp_path / name, path, **changes)).origin

    first = drawn("a")
    assert first.shape == (5, 2)
    assert np.array_equal(first, drawn("b"))
    assert not np.array_equal(first, drawn("c", seed=1))
    assert not np.array_equal(first, drawn("d", slide_id="t"))


@pytest.mark.parametrize("way", ["random", "densest", "grid", "all"])
def test_a_budget_bounds_every_way_of_sampling(tmp_path, way):
    path = paint(tmp_path / "s.svs")
    few = stores.open_patches(make(tmp_path / "a", path, sampling=way, patches_per_slide=2))
    every = stores.open_patches(make(tmp_path / "b", path, sampling=way, patches_per_slide=0))
    assert len(few) == 2 and len(every) == (100 if way == "all" else 3)
    assert {*map(tuple, few.origin)} < {*map(tuple, every.origin)}


def test_densest_takes_the_patches_with_most_nuclear_area(tmp_path):
    """A patch of three nuclei, one of two, and three of one each."""
    cells = [(40, 40), (88, 40), (40, 88), (680, 296), (728, 296)]
    cells += [(1216, 960), (320, 960), (320, 1216)]
    store = make(
        tmp_path / "a", paint(tmp_path / "s.svs", cells), sampling="densest", patches_per_slide=2
    )
    assert stores.open_patches(store).origin.tolist() == [[0, 0], [640, 256]]


def test_central_asks_for_cells_in_the_middle_that_embed_crops(tmp_path):
    corner, middle = (24, 24), (704, 320)
    path = paint(tmp_path / "s.svs", [corner, middle])
    both = stores.open_patches(make(tmp_path / "a", path))
    central = stores.open_patches(make(tmp_path / "b", path, central=True))
    assert both.origin.tolist() == [[0, 0], [640, 256]]
    assert central.origin.tolist() == [[640, 256]]
    crop = embedding.central_half(np.stack([central[0]]))
    assert (crop.reshape(-1, 3) < (110, 90, 150)).all(axis=1).any()


def test_central_is_named_where_it_leaves_nothing_and_is_no_matter_to_all(tmp_path):
    path = paint(tmp_path / "s.svs", [(24, 24), (152, 24)])
    with pytest.raises(ValueError, match="2 of its 100 positions hold nuclei.*tile.central to fal"):
        make(tmp_path / "a", path, central=True)
    make(tmp_path / "b", path, central=True, sampling="all", patches_per_slide=0)
    assert coverage.read(tmp_path / "b").with_cells == 2


def test_red_cells_are_foreground_where_cells_are_asked_for(tmp_path):
    pixels = np.full((SIDE, SIDE, 3), (244, 243, 240), np.uint8)
    for x, y in CELLS:
        for away in (-18, 18):
            cv2.circle(pixels, (x + away, y), 15, (222, 150, 140), -1)
    path = tmp_path / "s.png"
    cv2.imwrite(str(path), pixels[..., ::-1])
    with pytest.raises(ValueError, match="holds nuclei in focus"):
        make(tmp_path / "a", path)
    store = stores.open_patches(make(tmp_path / "b", path, foreground="cells"))
    holding = {(x // 128 * 128, y // 128 * 128) for x, y in CELLS}
    assert {tuple(map(int, corner)) for corner in store.origin} == holding


def test_counts_of_positions_lie_beside_the_patches(tmp_path):
    make(tmp_path / "out", paint(tmp_path / "s.svs"))
    counts = coverage.read(tmp_path / "out")
    assert (counts.positions, counts.with_cells, counts.cells) == (100, 3, 3)
    assert (counts.asked, counts.patches, counts.out_of_focus) == (5, 3, 0)
    assert sum(counts.blur["patches"].values()) == 3 and max(counts.blur["patches"]) <= 3
    assert counts.emptiness["positions"][9] >= 88


def test_same_slide_same_bytes(tmp_path):
    path = paint(tmp_path / "s.svs")
    trees = [make(tmp_path / name, path, codec="jpeg") for name in "ab"]
    files = [sorted(p for p in tree.rglob("*") if p.is_file()) for tree in trees]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_the_thumbnail_shows_the_patches(tmp_path):
    make(tmp_path / "out", paint(tmp_path / "s.svs"))
    picture = cv2.imread(str(tmp_path / "out" / "thumbnail.jpg"))[..., ::-1].astype(int)
    near = np.abs(picture - tile.CHOSEN_RGB).sum(axis=-1) < 60
    assert near.sum() > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mpp": 0.1}, "is 0.25 mpp, and 0.1 mpp patches would be invented"),
        ({"patch_px": 2000}, "smaller than a patch: lower tile.patch_px"),
        (
            {"foreground_od": 9.0},
            "slide s has no foreground: none of its 100 positions holds nuclei in focus .*; set "
            "tile.foreground to cells, lower tile.foreground_od, set tile.sampling to all",
        ),
    ],
)
def test_refuses_what_gives_no_patches(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", paint(tmp_path / "s.svs"), **changes)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("mpp", 0, "above 0"), ("foreground_um2", 0.0, "above 0"), ("patches_per_slide", -1, "0 or")],
)
def test_refuses_params_below_zero(name, value, least):
    with pytest.raises(ValueError, match=f"tile.{name} is {value}: it must be {least}"):
        replace(PARAMS, **{name: value})


def test_the_stage_tiles_a_cohort_and_redoes_one_slide_only(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    values = {"seed": 0, "sparse_topk": 0, "irpe": "none", "tile": asdict(PARAMS)}
    values["engine"] = {"workers": 1, "scheduler": ""}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    rows = [row(paint(tmp_path / f"{name}.svs"), name) for name in "ab"]
    cohort.write_rows(Path("data/cohort"), rows, ["a", "b"])
    caplog.set_level("INFO")
    tile.main()
    assert "tile: 2 slides to make, 0 reused" in caplog.text
    cohort.write_rows(Path("data/cohort"), [rows[0], replace(rows[1], digest="other")], ["a", "b"])
    tile.main()
    assert "tile: 1 slides to make, 1 reused" in caplog.text
    assert cache.describe(Path("data/tile/b"))["inputs"][0] == "other"
    assert len(stores.open_patches(Path("data/tile/a/patches.zarr"))) == 3
    metrics = json.loads(Path("data/tile/metrics.json").read_text())
    assert metrics["slides_with_few_patches"] == 2 and metrics["patches"] == 6
    assert "2 of 2 slides stand out" in caplog.text and "3 patches of the 5 asked" in caplog.text


def test_the_stage_quarantines_a_slide_that_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    values = {"seed": 0, "sparse_topk": 0, "irpe": "none", "tile": asdict(PARAMS)}
    values |= {"on_error": "quarantine", "engine": {"workers": 1, "scheduler": ""}}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    rows = [row(paint(tmp_path / f"{name}.svs"), name) for name in "ab"]
    (tmp_path / "b.svs").write_bytes((tmp_path / "b.svs").read_bytes()[:1000])
    cohort.write_rows(Path("data/cohort"), rows, ["a", "b"])
    tile.main()
    metrics = json.loads(Path("data/tile/metrics.json").read_text())
    assert (metrics["slides"], metrics["failed"], metrics["patches"]) == (1, 1, 3)
    assert "slide b.svs is damaged" in failures.read(Path("data/tile"))["b"]
    assert str(tmp_path) not in Path("data/tile/failed.csv").read_text()
