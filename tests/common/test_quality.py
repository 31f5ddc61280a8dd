"""Quality of detection: the tables against plain definitions, flags on cohorts made for them."""

import csv
import math
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


def cohort(count: int = 20, **odd: Tally) -> dict[str, Tally]:
    """Slides that differ as those of one laboratory do, and the odd ones."""
    even = {f"s{at}": slide(5 + at % 4, 3.8 + 0.1 * (at % 5)) for at in range(count)}
    return {**even, **odd}


def words(tallies: dict[str, Tally]) -> dict[str, list[str]]:
    return {name: list(flags) for name, flags in quality.find(tallies).items() if flags}


def test_an_even_cohort_flags_nothing():
    assert words(cohort()) == {}


def test_slides_that_are_all_alike_flag_nothing():
    assert words({f"s{at}": slide(5) for at in range(20)}) == {}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_small_cohort_is_not_compared(count):
    assert words({f"s{at}": slide(3.0 * 4**at, 3 + 0.5 * at) for at in range(count)}) == {}


def test_few_and_many_nuclei_are_told_apart():
    found = quality.find(cohort(pale=slide(0.5), dirty=slide(40)))
    assert {name: list(flags) for name, flags in found.items() if flags} == {
        "pale": ["few nuclei"],
        "dirty": ["many nuclei"],
    }
    few, many = found["pale"]["few nuclei"], found["dirty"]["many nuclei"]
    assert few.startswith("0.5 nuclei per patch in 50 patches, where 6.")
    assert "per patch are usual in this cohort: see in its overlay" in few
    assert "stain" in few and "mpp in cohort.csv" in few
    assert many.startswith("40 nuclei per patch") and "debris" in many


def test_a_slide_of_twice_the_usual_spread_within_a_factor_of_two_passes():
    even = {f"s{at}": slide(5 + 0.1 * (at % 3)) for at in range(20)}
    assert words({**even, "more": slide(9.5), "less": slide(2.7)}) == {}


def test_a_wide_cohort_flags_only_what_is_wider():
    wide = {f"s{at}": slide(2.0 ** (at % 5)) for at in range(25)}
    assert words({**wide, "within": slide(20.0)}) == {}


def test_no_nuclei_is_always_flagged():
    assert words({"only": slide(0)}) == {"only": ["no nuclei"]}
    alone = quality.find({"only": slide(0)})["only"]["no nuclei"]
    assert alone.startswith("No nucleus was found in 50 patches: see in its overlay")
    among = quality.find(cohort(blank=slide(0)))["blank"]["no nuclei"]
    assert among.startswith("No nucleus was found in 50 patches, where 6.")


def test_empty_slides_do_not_make_the_usual_ones_odd():
    empty = {f"e{at}": slide(0) for at in range(30)}
    assert set(words(cohort(**empty))) == set(empty)


def test_a_slide_of_few_patches_is_left_to_chance():
    assert words(cohort(small=slide(2, patches=1), large=slide(2, patches=90))) == {
        "large": ["few nuclei"]
    }


@pytest.mark.parametrize(("factor", "word"), [(0.6, "small nuclei"), (1.8, "large nuclei")])
def test_a_wrong_mpp_shows_in_the_radii(factor, word):
    found = quality.find(cohort(wrong=slide(6, 4 * factor)))
    assert [name for name, flags in found.items() if flags] == ["wrong"]
    why = found["wrong"][word]
    assert why.startswith(f"The median radius is {4 * factor:.2g}")
    assert " µm is usual in this cohort: its mpp in cohort.csv may be too" in why


def test_radii_that_no_cell_has_are_flagged_in_one_slide_too():
    assert words({"a": slide(6, 1.2), "b": slide(6, 11)}) == {
        "a": ["small nuclei"],
        "b": ["large nuclei"],
    }
    why = quality.find({"b": slide(6, 11)})["b"]["large nuclei"]
    assert "where 2 to 8 µm occur in cells" in why


def test_a_few_nuclei_say_nothing_of_the_radius():
    assert words(cohort(wrong=slide(6, 11, patches=3))) == {}


def test_the_spread_is_that_of_the_definition():
    values = [math.log1p(n) for n in (1, 4, 4.5, 5, 6, 7, 8, 9, 40)]
    usual = quality._usual(values)
    away = sorted(abs(value - sorted(values)[4]) for value in values)
    assert usual.value(1) == pytest.approx(6) and usual.spread == pytest.approx(1.4826 * away[4])


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
    }


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
