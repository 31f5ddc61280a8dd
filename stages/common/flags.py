"""What is odd about the nuclei of a slide, or of a whole cohort: found, expected, and what to do.

Against the other slides: log(1 + nuclei per patch) or log(median radius) stands out when it lies
`SPREADS` robust standard deviations (1.4826 MAD) from the cohort's median and is off by a factor
that matters, so that an even cohort flags nothing. The two stand out together when nuclei are wider
and fewer, or smaller and more, as at a wrong mpp, and their common distance is as large. Of fewer
than `COHORT` slides that factor is squared; fewer than `FEWEST` are not compared.

Against cells as such, each slide and all of them together, so that a cohort whose slides have the
same wrong mpp is found: the median radius must lie within `RADII_UM`, and few nuclei may lie at the
radii below and above which the detector drops them. Chance is allowed for: the fewer nuclei, the
more they may be off.
Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, for 3.5 robust standard
deviations; the factors, ranges and shares are ours. Seen with the detector hematoxylin, whose
limits on the radius squeeze the median (at an mpp wrong by 0.5, 0.67, 1.5 or 2 it is 0.7, 0.7, 1.4
or 1.8 times the right one): of 17 liquid-based Papanicolaou fields at a right mpp none is flagged,
their medians are 2.7 to 4.0 µm. Nine of them as one slide are flagged at each of the four factors;
of single fields (2 to 63 nuclei) all of 9 at 2, 8 at 0.67, 6 at 0.5 and 4 at 1.5, some by their
count alone. A drawn slide is flagged at the four factors and at 1.25, not at 0.8. Of a whole cohort
a factor of 2 is seen, hardly one of 1.4: nuclei differ that much from stain to stain.
"""

import math
from dataclasses import dataclass

import numpy as np

from stages.common import tally
from stages.common.tally import AT_LIMIT, LIMITS, Tally

SPREADS = 3.5
FEWEST, COHORT = 3, 8  # slides
COUNT_FACTOR = 2.0  # nuclei per patch against the usual
RADIUS_FACTOR = 1.3  # median radius against the usual
RADII_UM = (2.6, 5.0)  # medians that are expected, from lymphocytes to squamous cells
RADIUS_NUCLEI = 20  # slides with fewer do not say what radius is usual
LOG_SPREAD = 0.3  # standard deviation of log(radius) within a slide, measured 0.2 to 0.3
LIMIT_SHARES = {"least": 0.2, "most": 0.05}  # of the nuclei, at the detector's limits

CHECKS = {
    "no nuclei": "see in {its} overlay whether it is blank or out of focus, and check the stain "
    "against the detector's settings and {its} mpp in cohort.csv",
    "few nuclei": "see in {its} overlay whether it is pale, out of focus or nearly blank, and "
    "check the stain against the detector's settings and {its} mpp in cohort.csv",
    "many nuclei": "see in {its} overlay whether debris, blood or stain precipitate was taken for "
    "nuclei, and check {its} mpp in cohort.csv",
    "small nuclei": "{its} mpp in cohort.csv may be too small; see in {its} overlay too whether "
    "grains or debris were taken for nuclei",
    "large nuclei": "{its} mpp in cohort.csv may be too large; see in {its} overlay too whether "
    "clumps were taken for nuclei",
    "radii at the lower limit": "smaller ones were dropped; {its} mpp in cohort.csv may be too "
    "small, else lower the limit",
    "radii at the upper limit": "larger ones were dropped; {its} mpp in cohort.csv may be too "
    "large, else raise the limit",
}
IMPLIED = {"radii at the lower limit": "small nuclei", "radii at the upper limit": "large nuclei"}


@dataclass(frozen=True)
class Usual:
    """The cohort's middle, of logarithms; NaN where too few slides can say."""

    median: float
    spread: float  # robust standard deviation
    power: int = 1  # of the factor that matters

    def side(self, value: float, factor: float, offset: float = 0.0, chance: float = 0.0) -> int:
        """-1 or 1 where `value` is below or above all that is usual, else 0.

        Args:
            value: Compared as log(`offset` + value), which must exist.
            factor: What a difference that matters exceeds.
            offset: As in the logarithms that the median is of.
            chance: What the logarithm may be off by for want of nuclei.
        """
        if math.isnan(self.median):
            return 0
        away = math.log(offset + value) - self.median
        ratio, factor = value / self.value(offset), factor**self.power
        if abs(away) <= SPREADS * self.spread + chance or 1 / factor < ratio < factor:
            return 0
        return 1 if away > 0 else -1

    def value(self, offset: float = 0.0) -> float:
        """The median itself."""
        return math.exp(self.median) - offset


NOTHING_USUAL = Usual(math.nan, math.nan)


def find(tallies: dict[str, Tally]) -> dict[str, dict[str, str]]:
    """For each slide its flags: two or three words, and a sentence."""
    filled = [one for one in tallies.values() if one.nuclei]
    counts = _usual([math.log1p(one.nuclei / one.patches) for one in filled])
    measured = [one.radius_um["p50"] for one in filled if one.nuclei >= RADIUS_NUCLEI]
    radii = _usual([math.log(radius) for radius in measured])
    return {
        slide_id: {**_count_flag(one, counts), **_size_flags(one, radii, counts)}
        for slide_id, one in tallies.items()
    }


def overall(tallies: dict[str, Tally], found: dict[str, dict[str, str]]) -> dict[str, str]:
    """The same of several slides together: what is wrong with all of them alike.

    Args:
        tallies: By slide.
        found: What `find` gave; slides of many nuclei, which would speak for all, are left out.
    """
    some = [one for slide_id, one in tallies.items() if "many nuclei" not in found[slide_id]]
    if len(some) < 2:
        return {}
    together, its = tally.total(some), "the slides'"
    return _size_flags(together, NOTHING_USUAL, NOTHING_USUAL, its)


def _usual(values: list[float]) -> Usual:
    if len(values) < FEWEST:
        return NOTHING_USUAL
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.array(values) - median)))
    return Usual(median, spread, power=1 if len(values) >= COHORT else 2)


def _count_flag(one: Tally, usual: Usual) -> dict[str, str]:
    per_patch = one.nuclei / one.patches if one.patches else 0.0
    expected = 0.0 if math.isnan(usual.median) else usual.value(1) * one.patches
    side = usual.side(per_patch, COUNT_FACTOR, offset=1)
    # A slide of few patches varies as counts do by chance.
    if one.nuclei and (not side or abs(one.nuclei - expected) <= 3 * math.sqrt(expected)):
        return {}
    word = "no nuclei" if not one.nuclei else "few nuclei" if side < 0 else "many nuclei"
    found = f"{per_patch:.3g} nuclei per patch in {one.patches} patches"
    if not one.nuclei:
        found = f"No nucleus was found in {one.patches} patches"
    known = f", where {usual.value(1):.3g} per patch are usual in this cohort" if expected else ""
    return _flag(word, found + known, "its")


def _size_flags(one: Tally, usual: Usual, counts: Usual, its: str = "its") -> dict[str, str]:
    """Of the median, or else of the limits: one cause is told once."""
    median = _radius_flag(one, usual, counts, its)
    return median | {
        word: why for word, why in _limit_flags(one, its).items() if IMPLIED[word] not in median
    }


def _radius_flag(one: Tally, usual: Usual, counts: Usual, its: str) -> dict[str, str]:
    if not one.nuclei:
        return {}
    radius = one.radius_um["p50"]
    # Twice the standard error of a median: 1.2533 of that of a mean.
    chance = 2 * 1.2533 * LOG_SPREAD / math.sqrt(one.nuclei)
    side = usual.side(radius, RADIUS_FACTOR, chance=chance)
    known = f"where {usual.value():.3g} µm is usual in this cohort" if side else ""
    if not side and (side := _scaled(one, usual, counts, chance)):
        known = (
            f"and {one.nuclei / one.patches:.3g} lie in a patch, where {usual.value():.3g} µm and "
            f"{counts.value(1):.3g} are usual in this cohort, as another scale makes them"
        )
    low, high = RADII_UM[0] * math.exp(-chance), RADII_UM[1] * math.exp(chance)
    if not low <= radius <= high:
        side = 1 if radius > high else -1
        known = known or "where {:.3g} to {:.3g} µm are expected of cells".format(*RADII_UM)
    if not side:
        return {}
    found = f"The median radius of {one.nuclei} nuclei is {radius:.3g} µm, {known}"
    return _flag("small nuclei" if side < 0 else "large nuclei", found, its)


def _scaled(one: Tally, radii: Usual, counts: Usual, chance: float) -> int:
    """1 or -1 where nuclei are wider and fewer, or smaller and more, than usual; else 0.

    So does an mpp that is too large, or too small. Both are taken as one distance: neither alone
    need be beyond all that is usual.
    """
    wider = math.log(one.radius_um["p50"]) - radii.median
    fewer = counts.median - math.log1p(one.nuclei / one.patches)
    least = radii.power * math.log(RADIUS_FACTOR)
    off = least <= min(wider, fewer) or max(wider, fewer) <= -least  # NaN: not off
    allowed = (radii.spread, chance), (counts.spread, 2 / math.sqrt(one.nuclei))
    away = [
        max(abs(value) - by_chance, 0) / max(spread, 1e-9)
        for value, (spread, by_chance) in zip((wider, fewer), allowed, strict=True)
    ]
    return int(math.copysign(1, wider)) if off and math.hypot(*away) > SPREADS else 0


def _limit_flags(one: Tally, its: str) -> dict[str, str]:
    flags: dict[str, str] = {}
    for side, limit_um in one.limits_um.items():
        share, near = LIMIT_SHARES[side], one.at_limit[side]
        if near > share * one.nuclei + 3 * math.sqrt(share * one.nuclei):
            found = (
                f"{near / one.nuclei:.0%} of {one.nuclei} nuclei have a radius within "
                f"{AT_LIMIT:.0%} of the detector's {LIMITS[side]} ({limit_um:g} µm), where "
                f"{share:.0%} at most are expected"
            )
            word = f"radii at the {'lower' if side == 'least' else 'upper'} limit"
            flags |= _flag(word, found, its)
    return flags


def _flag(word: str, found: str, its: str) -> dict[str, str]:
    return {word: f"{found}: {CHECKS[word].format(its=its)}."}
