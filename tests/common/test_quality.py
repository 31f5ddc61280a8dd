"""Quality of detection: the tables and the log against plain definitions."""

import csv
from pathlib import Path

import numpy as np
import pytest

from stages.common import quality, tally
from stages.common.tally import Tally

RNG = np.random.default_rng(5)


def slide(per_patch: float, radius_um: float = 4.0, patches: int = 50) -> Tally:
    """A slide with close to `per_patch` nuclei in each patch, their radii within a tenth."""
    rng = np.random.default_rng(round(per_patch * 100))
    index = np.sort(rng.integers(0, patches, round(per_patch * patches)))
    return tally.of(patches, index, rng.uniform(0.9, 1.1, len(index)) * radius_um)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def stage(folder: Path) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Slides on disk, and what they were tallied from."""
    slides = {}
    for at, name in enumerate(["a", "b,\n<c>", "none"]):
        patches = 7 + 4 * at
        nuclei = 0 if name == "none" else 31 - 8 * at
        index = np.sort(RNG.integers(0, patches, nuclei))
        radius = RNG.uniform(2, 7, nuclei).astype(np.float32)
        slides[name] = patches, index, radius
        (folder / name).mkdir()
        tally.write(folder / name, tally.of(patches, index, radius))
    return slides


def test_the_tables_hold_what_they_say(tmp_path):
    slides = stage(tmp_path)
    quality.write(tmp_path, list(slides))
    rows = read(tmp_path / "slides.csv")
    assert [row["slide_id"] for row in rows] == list(slides)
    for row, (patches, index, radius) in zip(rows, slides.values(), strict=True):
        assert int(row["patches"]) == patches and int(row["nuclei"]) == len(index)
        assert float(row["nuclei_per_patch"]) == pytest.approx(len(index) / patches, abs=1e-4)
        empty = sum(at not in index for at in range(patches))
        assert float(row["empty_share"]) == pytest.approx(empty / patches, abs=1e-4)
        for share in (5, 25, 50, 75, 95):
            cell = row[f"radius_p{share:02d}_um"]
            wanted = np.percentile(radius, share) if len(radius) else None
            assert cell == "" if wanted is None else float(cell) == pytest.approx(wanted, abs=1e-4)
    assert [row["flags"] for row in rows] == ["", "", "no nuclei"]
    assert rows[2]["why"].startswith("No nucleus was found in 15 patches: ")


def test_the_histograms_count_every_patch_and_nucleus(tmp_path):
    slides = stage(tmp_path)
    quality.write(tmp_path, list(slides))
    held = [list(index).count(at) for patches, index, _ in slides.values() for at in range(patches)]
    assert {
        int(row["nuclei"]): int(row["patches"]) for row in read(tmp_path / "nuclei_per_patch.csv")
    } == {count: held.count(count) for count in set(held)}
    radii = np.concatenate([radius for _, _, radius in slides.values()])
    bins = [[float(cell) for cell in row.values()] for row in read(tmp_path / "radius.csv")]
    assert sum(count for *_, count in bins) == len(radii) == 54
    for low, high, count in bins:
        assert count == ((radii >= low) & (radii < high)).sum() > 0 and high - low == 0.25


def test_the_metrics_count(tmp_path):
    slides = stage(tmp_path)
    metrics = quality.write(tmp_path, list(slides))
    empty = sum(patches - len(set(index)) for patches, index, _ in slides.values())
    assert metrics == {
        "slides": 3,
        "patches": 7 + 11 + 15,
        "nuclei": 54,
        "nuclei_per_patch": 54 / 33,
        "patches_without_nuclei": empty,
        "slides_flagged": 1,
        "cohort_flags": 0,
    }


def test_what_is_wrong_with_all_slides_is_said_first(tmp_path, caplog):
    """Each of them holds too few nuclei to say it."""
    names = [f"s{at}" for at in range(40)]
    for name in names:
        (tmp_path / name).mkdir()
        tally.write(tmp_path / name, slide(0.2, 2.2))
    assert quality.write(tmp_path, names)["cohort_flags"] == 1
    assert caplog.records[0].getMessage().startswith("all 40 slides together: The median radius")
    (row,) = read(tmp_path / "overall.csv")
    assert row["flag"] == "small nuclei" and "the slides' mpp in cohort.csv" in row["why"]


def test_a_total_is_the_tally_of_all_nuclei():
    radii = [RNG.uniform(2, 7, count).astype(np.float32) for count in (30, 0, 71)]
    limits = {"least": 2.0, "most": 7.0}
    parts = [tally.of(9, np.sort(RNG.integers(0, 9, len(r))), r, limits) for r in radii]
    total = tally.total(parts)
    whole = tally.of(27, np.zeros(101, np.int64), np.concatenate(radii), limits)
    assert (total.patches, total.nuclei, total.radius_bins) == (27, 101, whole.radius_bins)
    assert total.at_limit == whole.at_limit and total.limits_um == limits
    assert sum(total.per_patch.values()) == 27
    assert total.radius_um["p50"] == pytest.approx(whole.radius_um["p50"], abs=0.25)
    assert tally.total([]).nuclei == 0


def test_the_median_of_a_histogram_by_hand():
    assert tally._median({0: 2, 4: 2}) == 0.25  # two of four lie below the end of the first bin
    assert tally._median({4: 1, 8: 4}) == pytest.approx((8 + 1.5 / 4) * 0.25, abs=1e-4)


def test_nuclei_at_the_limits_are_counted_within_a_fifth():
    radius = np.array([1.8, 2.16, 2.17, 4.0, 7.19, 7.2, 9.0])
    one = tally.of(1, np.zeros(7, np.int64), radius, {"least": 1.8, "most": 9.0})
    assert one.at_limit == {"least": 2, "most": 2}


def test_the_odd_slides_are_logged_once_and_not_by_the_thousand(tmp_path, caplog):
    names = [f"e{at:02d}" for at in range(23)]
    for name in names:
        (tmp_path / name).mkdir()
        tally.write(tmp_path / name, slide(0))
    quality.write(tmp_path, names)
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert "23 of 23 slides stand out, see" in caplog.text and "e19: No nucleus" in caplog.text
    assert "e20" not in caplog.text and caplog.text.rstrip().endswith("and 3 more")


def test_an_even_cohort_logs_nothing(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    tally.write(tmp_path / "a", slide(4))
    assert quality.write(tmp_path, ["a"])["slides_flagged"] == 0
    assert not caplog.records


def test_a_tally_is_read_as_written(tmp_path):
    one = slide(3)
    tally.write(tmp_path, one)
    assert tally.read(tmp_path) == one
    with pytest.raises(FileNotFoundError, match="run `dvc repro detect` first"):
        tally.read(tmp_path / "gone")
