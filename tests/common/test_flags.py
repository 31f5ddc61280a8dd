"""Flags on cohorts made for them: what stands out, what is expected, and what is left to chance."""

import math

import numpy as np
import pytest

from stages.common import flags, tally
from stages.common.tally import Tally

LIMITS = {"least": 1.8, "most": 9.0}


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
    return {name: list(flags) for name, flags in flags.find(tallies).items() if flags}


def test_an_even_cohort_flags_nothing():
    assert words(cohort()) == {}


def test_slides_that_are_all_alike_flag_nothing():
    assert words({f"s{at}": slide(5) for at in range(20)}) == {}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_small_cohorts_of_great_spread_flag_nothing(count):
    assert words({f"s{at}": slide(3.0 * 2**at, 3 + 0.3 * at) for at in range(count)}) == {}


def test_two_slides_are_not_compared():
    assert words({"a": slide(3), "b": slide(60)}) == {}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_cohort_is_compared_by_a_larger_factor(count):
    even = {f"s{at}": slide(5 + 0.2 * at, 3 + 0.05 * at) for at in range(count)}
    assert words({**even, "more": slide(17, 3), "wider": slide(5, 4.8)}) == {}
    assert words({**even, "most": slide(60, 3)}) == {"most": ["many nuclei"]}
    assert words({**even, "widest": slide(5, 4.0 * 1.69)}) == {"widest": ["large nuclei"]}


def test_few_and_many_nuclei_are_told_apart():
    found = flags.find(cohort(pale=slide(0.5), dirty=slide(40)))
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
    alone = flags.find({"only": slide(0)})["only"]["no nuclei"]
    assert alone.startswith("No nucleus was found in 50 patches: see in its overlay")
    among = flags.find(cohort(blank=slide(0)))["blank"]["no nuclei"]
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
    found = flags.find(cohort(wrong=slide(6, 4 * factor)))
    assert [name for name, flags in found.items() if flags] == ["wrong"]
    why = found["wrong"][word]
    assert why.startswith("The median radius of 300 nuclei is ")
    assert f"{4 * factor:.2g}" in why
    assert " µm is usual in this cohort: its mpp in cohort.csv may be too" in why


def test_radii_that_no_cell_has_are_flagged_in_one_slide_too():
    assert words({"a": slide(6, 1.2), "b": slide(6, 11)}) == {
        "a": ["small nuclei"],
        "b": ["large nuclei"],
    }
    why = flags.find({"b": slide(6, 11)})["b"]["large nuclei"]
    assert "where 2.6 to 5 µm are expected of cells: its mpp in cohort.csv may be too large" in why


def test_few_nuclei_must_be_further_off():
    """The median of n has a standard error near 0.38 / sqrt(n), as a share of itself."""
    assert words({"a": slide(6, 2.3, patches=100)}) == {"a": ["small nuclei"]}
    assert words({"a": slide(6, 2.3, patches=2)}) == {}
    assert words({"a": slide(6, 1.9, patches=2)}) == {"a": ["small nuclei"]}
    assert words({"a": slide(1, 1.8, patches=1), "b": slide(1, 8, patches=1)}) == {}


@pytest.mark.parametrize(("radius_um", "word"), [(2.0, "small nuclei"), (6.3, "large nuclei")])
def test_a_cohort_of_one_wrong_mpp_is_flagged_as_a_whole(radius_um, word):
    """Alike, so that no slide stands out among the others, and few nuclei in each."""
    alike = {f"s{at}": slide(0.5, radius_um, patches=8) for at in range(25)}
    found = flags.find(alike)
    assert not any(found.values())
    together = flags.overall(alike, found)
    assert list(together) == [word]
    assert together[word].startswith("The median radius of 100 nuclei is ")
    assert "the slides' mpp in cohort.csv may be too" in together[word]


def test_one_slide_of_many_nuclei_does_not_speak_for_all():
    tallies = cohort(dirty=slide(400, 2.2))
    found = flags.find(tallies)
    assert "many nuclei" in found["dirty"] and flags.overall(tallies, found) == {}


def test_a_right_cohort_and_a_single_slide_are_not_flagged_as_a_whole():
    assert flags.overall(cohort(), flags.find(cohort())) == {}
    alone = {"only": slide(6, 2.0)}
    assert flags.overall(alone, flags.find(alone)) == {}


@pytest.mark.parametrize(
    ("share", "radius_um", "word"),
    [
        (0.35, 2.0, ["radii at the lower limit"]),
        (0.2, 2.0, []),
        (0.15, 8.0, ["radii at the upper limit"]),
        (0.05, 8.0, []),
    ],
)
def test_many_radii_at_the_detectors_limit_are_flagged(share, radius_um, word):
    """Of 200 nuclei; a detector that drops smaller ones hides how small they are."""
    radius = np.where(np.arange(200) < share * 200, radius_um, 3.5)
    one = tally.of(40, np.repeat(np.arange(40), 5), radius, LIMITS)
    found = flags.find({"a": one})["a"]
    assert list(found) == word
    if word:
        limit = "min_radius_um (1.8 µm)" if radius_um < 3 else "max_radius_um (9 µm)"
        assert found[word[0]].startswith(f"{share:.0%} of 200 nuclei have a radius within 20% of")
        assert f"{limit}, where " in found[word[0]] and "mpp in cohort.csv" in found[word[0]]


def test_a_detector_without_limits_has_none_to_flag():
    one = tally.of(40, np.repeat(np.arange(40), 5), np.where(np.arange(200) < 90, 2.0, 3.5))
    assert flags.find({"a": one})["a"] == {}


def test_the_spread_is_that_of_the_definition():
    values = [math.log1p(n) for n in (1, 4, 4.5, 5, 6, 7, 8, 9, 40)]
    usual = flags._usual(values)
    away = sorted(abs(value - sorted(values)[4]) for value in values)
    assert usual.value(1) == pytest.approx(6) and usual.spread == pytest.approx(1.4826 * away[4])


def test_one_cause_is_told_once():
    one = tally.of(40, np.repeat(np.arange(40), 5), np.full(200, 2.0), LIMITS)
    assert list(flags.find({"a": one})["a"]) == ["small nuclei"]


def test_a_few_radii_at_the_limit_are_chance():
    """A twentieth of 20 and three standard deviations: four may be large, five may not."""
    for large, word in ((4, []), (5, ["radii at the upper limit"])):
        radius = np.where(np.arange(20) < large, 7.5, 4.0)
        one = tally.of(20, np.arange(20), radius, LIMITS)
        assert list(flags.find({"a": one})["a"]) == word


def test_the_median_of_a_few_nuclei_is_not_held_against_a_slide():
    """Of 3 nuclei it is off by 1.4 times now and then; of 300 it is not."""
    assert words(cohort(few=slide(3, 2.8, patches=1))) == {}
    assert words(cohort(many=slide(6, 2.8))) == {"many": ["small nuclei"]}
