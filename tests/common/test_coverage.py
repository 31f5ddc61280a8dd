"""Counts of positions: right, kept beside the patches, summed up, and told where they are odd."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from stages.common import coverage, tile_figures
from stages.common.content import Content
from stages.common.coverage import Coverage

HELD = Content(
    cells_um2=np.array([30.0, 0, 0, 50, 0, 0]),
    middle_um2=np.zeros(6),
    blur_um=np.array([0.6, 2.6, np.nan, 0.8, 9.0, 1.2]),
    emptiness=np.array([0.3, 0.5, 1.0, 0.95, 0.99, 0.8]),
    limit_um=2.0,
)
FINE = Coverage(10, 8, 1, 30, 4, 4, {"positions": {2: 8}, "patches": {2: 4}}, {
    "positions": {5: 10}, "patches": {5: 4}
})  # fmt: skip


def test_positions_are_counted_by_what_they_hold():
    cells = HELD.holds_cells(12, False)
    found = coverage.of(HELD, cells, np.array([3]), cells=7, asked=2)
    assert cells.tolist() == [True, False, False, True, False, False]
    # The last but one is blurred, and holds too little to tell.
    assert HELD.out_of_focus.tolist() == [False, True, False, False, False, False]
    assert (found.positions, found.with_cells, found.out_of_focus) == (6, 2, 1)
    assert (found.cells, found.asked, found.patches) == (7, 2, 1)
    assert found.blur == {"positions": {2: 1, 3: 1, 4: 1, 10: 1, 15: 1}, "patches": {3: 1}}
    assert found.emptiness["positions"] == {3: 1, 5: 1, 8: 1, 9: 3}


def test_the_middle_must_hold_cells_where_that_is_asked_for():
    held = replace(HELD, middle_um2=np.array([0.0, 0, 0, 20, 0, 0]))
    assert held.holds_cells(12, True).tolist() == [False, False, False, True, False, False]


def test_what_is_written_is_read(tmp_path):
    coverage.write(tmp_path, FINE)
    assert coverage.read(tmp_path) == FINE


def test_slides_stand_out_by_few_patches_blur_and_no_cells():
    assert coverage.flags(FINE) == {}
    assert coverage.flags(replace(FINE, asked=0)) == {}
    few = coverage.flags(replace(FINE, patches=2, with_cells=2))
    assert list(few) == ["few patches"]
    assert "2 patches of the 4 asked for: 2 of 10 positions hold cells" in few["few patches"]
    assert list(coverage.flags(replace(FINE, out_of_focus=9))) == ["out of focus"]
    assert list(coverage.flags(replace(FINE, out_of_focus=8))) == []
    assert list(coverage.flags(replace(FINE, with_cells=0, out_of_focus=0))) == ["no cells"]


def test_a_small_slide_full_of_cells_does_not_stand_out():
    small = replace(FINE, positions=6, with_cells=6, asked=200, patches=6)
    assert coverage.flags(small) == {}
    assert coverage.flags(replace(small, with_cells=1, out_of_focus=0)) == {}  # by sampling all
    assert list(coverage.flags(replace(small, with_cells=1, patches=1))) == ["few patches"]


def written(folder: Path, slides: dict[str, Coverage]) -> dict[str, int]:
    for slide_id, one in slides.items():
        (folder / slide_id).mkdir()
        coverage.write(folder / slide_id, one)
    return coverage.write_tables(folder, list(slides))


def test_tables_hold_every_slide_and_the_cohort(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    metrics = written(
        tmp_path, {"NA": FINE, "=1+1": replace(FINE, patches=1, with_cells=1, out_of_focus=9)}
    )
    assert metrics == {
        "slides": 2, "patches": 5, "fewest_patches": 1,
        "slides_with_few_patches": 1, "slides_out_of_focus": 1,
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "slides.csv", keep_default_na=False)
    assert table.slide_id.tolist() == ["NA", "=1+1"]
    assert table["flags"].tolist() == ["", "few patches, out of focus"]
    histograms = pd.read_csv(tmp_path / "histograms.csv")
    assert histograms.values.tolist() == [
        ["blur", 0.5, 0.75, 16, 8], ["emptiness", 0.5, 0.6, 20, 8]
    ]  # fmt: skip
    assert "1 of 2 slides stand out" in caplog.text and "=1+1: 1 patches of the 4" in caplog.text


def test_bars_are_each_as_high_as_their_share_of_the_highest():
    found = tile_figures.bars({"positions": {0: 5, 2: 10}, "patches": {2: 3}}, 4)
    assert found == [(0.5, 0.0), (0.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    assert tile_figures.bars({"positions": {}, "patches": {}}, 2) == [(0, 0), (0, 0)]


def test_the_cohort_of_a_thousand_slides_is_one_small_plot(tmp_path):
    table = pd.DataFrame(
        coverage._histograms([FINE] * 1000),
        columns=["measure", "from", "to", "positions", "patches"],
    )
    for measure in ("blur", "emptiness"):
        assert len(tile_figures.histogram(table, measure)) < 30_000
