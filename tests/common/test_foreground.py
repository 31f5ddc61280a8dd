"""Cells are found at 10x, in windows, beside artefacts; held against truth that was drawn."""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import artefacts
from stages.common import content, foreground, params, sampling
from stages.common.foreground import Survey
from stages.common.slides import Slide
from stages.sources import synthetic

ROOT = Path(__file__).resolve().parents[2]
LIMIT_UM, LEAST_UM2 = 2.0, 12.0
SIDE = 1536  # of the drawn slide, level-0 pixels


@dataclass(frozen=True)
class Settings:
    foreground: str = "nuclei"
    foreground_od: float = 0.08
    mpp: float = 0.5
    patch_px: int = 64


@dataclass
class Drawn:
    """A drawn slide before artefacts."""

    pixels: np.ndarray
    points: np.ndarray  # of its nuclei, level-0 pixels
    mpp: float

    def judged(self, folder: Path, pixels: np.ndarray, settings: Settings = Settings()):
        """The grid, whether each position holds cells, and what it holds."""
        path = folder / "slide.tiff"
        synthetic.write_pyramid(path, pixels, self.mpp, 88)
        found, grid = look(Slide(path), settings)
        held = content.of(found, grid, settings.patch_px, LIMIT_UM)
        return grid, held.holds_cells(LEAST_UM2, False), held

    def holding(self, grid: sampling.Grid) -> np.ndarray:
        return grid.sums(*self.points.T, np.ones(len(self.points))) > 0


def share_of(mask: np.ndarray, side: int = 128) -> np.ndarray:
    """Of each position of 64 px at 0.5 mpp."""
    count = len(mask) // side
    return mask.reshape(count, side, count, side).mean(axis=(1, 3)).ravel()


def look(slide: Slide, settings: Settings) -> tuple[Survey, sampling.Grid]:
    scale = settings.mpp / slide.mpp
    extent = (slide.width_px, slide.height_px)
    grid = sampling.grid(extent, settings.patch_px, settings.patch_px, scale)
    return foreground.survey(slide, settings), grid


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    settings = params.load(synthetic.Params, "cohort.synthetic", ROOT / "params.yaml")
    settings = replace(settings, width_px=SIDE, height_px=SIDE, cells_per_mm2=400.0)
    image, truth = synthetic.draw(True, np.random.default_rng([3, 4]), settings)
    return Drawn(image, np.array([(one.x, one.y) for one in truth]), settings.mpp)


@pytest.fixture(scope="module")
def before(drawn, tmp_path_factory) -> np.ndarray:
    """Which positions hold cells before artefacts come."""
    return drawn.judged(tmp_path_factory.mktemp("before"), drawn.pixels)[1]


@pytest.mark.parametrize(("side_px", "recall"), [(64, 0.9), (128, 0.98)])
def test_patches_with_nuclei_are_found_and_few_others(drawn, tmp_path, side_px, recall):
    settings = Settings(patch_px=side_px)
    grid, found, _ = drawn.judged(tmp_path, drawn.pixels, settings)
    wanted = drawn.holding(grid)
    assert 0.1 < wanted.mean() < 0.8
    assert (found & wanted).sum() / wanted.sum() >= recall
    assert (found & wanted).sum() / found.sum() >= 0.9


@pytest.mark.parametrize("name", sorted(set(artefacts.PAINTERS) - {"out of focus"}))
def test_artefacts_are_no_cells_and_cells_beside_them_are(drawn, before, tmp_path, name):
    pixels = drawn.pixels.copy()
    touched = artefacts.PAINTERS[name](pixels, drawn.mpp, np.random.default_rng(2))
    grid, found, _ = drawn.judged(tmp_path, pixels)
    share = share_of(touched)
    blank = (share > 0) & ~drawn.holding(grid)
    clean = drawn.holding(grid) & (share == 0) & before
    assert blank.sum() >= 4 and clean.sum() >= 8
    assert (found & ~before)[blank].mean() <= 0.05 and found[clean].mean() >= 0.95


def test_what_is_out_of_focus_is_told_and_not_kept(drawn, before, tmp_path):
    pixels = drawn.pixels.copy()
    touched = artefacts.out_of_focus(pixels, drawn.mpp, np.random.default_rng(2))
    grid, found, held = drawn.judged(tmp_path, pixels)
    share = share_of(touched)
    soft, sharp = share > 0.999, share == 0
    assert found[soft & drawn.holding(grid)].mean() <= 0.1
    assert held.out_of_focus[soft & drawn.holding(grid)].mean() >= 0.8
    assert found[sharp & before].mean() >= 0.95
    assert held.out_of_focus[sharp].mean() <= 0.1


def test_windows_lose_and_double_nothing(drawn, tmp_path, monkeypatch):
    path = tmp_path / "slide.png"
    cv2.imwrite(str(path), drawn.pixels[..., ::-1])
    slide = Slide(path, drawn.mpp)
    whole = foreground.survey(slide, Settings())
    monkeypatch.setattr(foreground, "WINDOW_PX", (144, 208))
    parts = foreground.survey(slide, Settings())
    order = [np.lexsort((one.cells.x.round(), one.cells.y.round())) for one in (whole, parts)]
    assert len(parts.cells.x) == len(whole.cells.x) > 20
    for name in ("x", "y", "area_um2"):
        one, other = (
            getattr(s.cells, name)[at] for s, at in zip((whole, parts), order, strict=True)
        )
        assert np.allclose(one, other, atol=1e-6), name
    assert len(parts.squares.x) == len(whole.squares.x) == (SIDE // 64) ** 2
    for name in ("area_um2", "stained_um2", "once"):
        one, other = (getattr(s.squares, name).sum() for s in (whole, parts))
        assert one == pytest.approx(other, rel=1e-4), name
    assert whole.squares.area_um2.sum() == pytest.approx((SIDE / 4) ** 2)


def test_a_slide_without_colour_shows_its_nuclei(drawn, tmp_path):
    gray = drawn.pixels.min(axis=2, keepdims=True).repeat(3, axis=2)
    grid, found, _ = drawn.judged(tmp_path, gray)
    assert found[drawn.holding(grid)].mean() >= 0.9


def test_black_specks_in_a_blank_slide_are_no_nuclei_whatever_the_light(tmp_path):
    pixels = np.full((1024, 1024, 3), (231, 226, 214), np.uint8)
    blank = Drawn(pixels, np.empty((0, 2)), 0.25)
    for x in range(64, 1024, 128):
        cv2.circle(pixels, (x, x), 14, (40, 40, 38), -1)
    _, found, held = blank.judged(tmp_path, pixels)
    assert not found.any() and held.cells_um2.sum() == 0


@pytest.mark.parametrize("extent", [(37, 41), (20, 900)])
def test_tiny_slides_are_looked_at_too(tmp_path, extent):
    path = tmp_path / "cell.png"
    cv2.imwrite(str(path), np.full((*extent, 3), 200, np.uint8))
    for kind in ("nuclei", "cells"):
        found = foreground.survey(Slide(path, 0.06), Settings(kind, mpp=0.06, patch_px=7))
        assert len(found.cells.x) == 0 and found.squares.area_um2.sum() > 0


def shown(shared: Path, set_name: str) -> list[tuple[Path, np.ndarray]]:
    """Fields of a real set with the boxes of its objects."""
    rows = np.genfromtxt(
        shared / set_name / "objects.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"
    )
    files = sorted({str(path) for path in rows["path"]})
    return [(shared / set_name / file, rows[rows["path"] == file]) for file in files]


def test_nuclei_of_real_papanicolaou_smears_are_found(shared_data):
    """Nuclei at 0.8 mpp, an estimate: patches of 64 um."""
    hits = wanted = wrong = 0
    for file, rows in shown(shared_data, "lbc_nuclei_jks43")[1:6:2]:
        found, grid = look(Slide(file, 0.8), Settings(mpp=0.8, patch_px=80))
        cells = content.of(found, grid, 80, LIMIT_UM).holds_cells(LEAST_UM2, False)
        truth = grid.sums(rows["x"], rows["y"], np.ones(len(rows))) > 0
        hits, wanted = hits + (cells & truth).sum(), wanted + truth.sum()
        wrong += (cells & ~truth).sum()
    assert wanted > 50 and hits / wanted >= 0.9 and hits / (hits + wrong) >= 0.9


def test_red_cells_of_real_blood_films_are_cells_and_no_nuclei(shared_data):
    """Red cells at 0.2 mpp, an estimate: patches of 16 um."""
    kept = {}
    for kind in ("nuclei", "cells"):
        shares = []
        for file, rows in shown(shared_data, "chula_rbc12")[:3]:
            found, grid = look(Slide(file, 0.2), Settings(kind, mpp=0.2, patch_px=80))
            cells = content.of(found, grid, 80, LIMIT_UM).holds_cells(LEAST_UM2, False)
            truth = grid.sums(rows["x"], rows["y"], np.ones(len(rows))) > 0
            shares.append(cells[truth].mean())
        kept[kind] = np.mean(shares)
    assert kept["cells"] >= 0.9 and kept["nuclei"] <= 0.1


def test_dense_stained_tissue_is_no_ink(shared_data):
    slide = Slide(shared_data / "wsi" / "CMU-1-Small-Region.svs")
    found, grid = look(slide, Settings(mpp=0.5, patch_px=128))
    cells = content.of(found, grid, 128, LIMIT_UM).holds_cells(LEAST_UM2, False)
    middle = (grid.corners + grid.side / 2) / (slide.width_px, slide.height_px)
    epithelium = (np.abs(middle - (0.49, 0.30)) < (0.05, 0.05)).all(axis=1)
    glass = (middle < (0.2, 0.15)).all(axis=1)
    assert cells[epithelium].all() and epithelium.sum() >= 2
    assert cells[glass].sum() <= 1 < glass.sum()
