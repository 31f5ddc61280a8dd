"""Which slides have nuclei unlike the others': tables for the report, sentences for the user.

    slides.csv            a slide a row: counts, radii, flags and why
    nuclei_per_patch.csv  nuclei, patches: patches of the whole cohort that hold so many nuclei
    radius.csv            from_um, to_um, nuclei: radii of the whole cohort

A slide stands out when its log(1 + nuclei per patch) or log(median radius) lies `SPREADS` robust
standard deviations (1.4826 MAD) from the cohort's median and is off by a factor that matters, so
that an even cohort flags nothing. Fewer than `COHORT` slides are not compared.
Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, for 3.5 robust standard
deviations; the factors and the range of radii are ours.
"""

import csv
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import tally
from stages.common.run import atomic
from stages.common.tally import QUANTILES, RADIUS_BIN_UM, Tally

logger = logging.getLogger(__name__)

SPREADS = 3.5
COHORT = 8  # slides with nuclei, below which nothing is usual
COUNT_FACTOR = 2.0  # nuclei per patch against the usual
RADIUS_FACTOR = 1.3  # median radius against the usual
RADII_UM = (2.0, 8.0)  # medians that occur, from small lymphocytes to large tumour cells
RADIUS_NUCLEI = 20  # with fewer, a slide's median radius says little
LISTED = 20  # slides named in the log

CHECKS = {
    "no nuclei": "see in its overlay whether the slide is blank or out of focus, and check its "
    "stain against the detector's settings and its mpp in cohort.csv",
    "few nuclei": "see in its overlay whether the slide is pale, out of focus or nearly blank, and "
    "check its stain against the detector's settings and its mpp in cohort.csv",
    "many nuclei": "see in its overlay whether debris, blood or stain precipitate was taken for "
    "nuclei, and check its mpp in cohort.csv",
    "small nuclei": "its mpp in cohort.csv may be too small; see in its overlay too whether grains "
    "or debris were taken for nuclei",
    "large nuclei": "its mpp in cohort.csv may be too large; see in its overlay too whether clumps "
    "were taken for nuclei",
}


@dataclass(frozen=True)
class Usual:
    """The cohort's middle, of logarithms; NaN where too few slides can say."""

    median: float
    spread: float  # robust standard deviation

    def side(self, value: float, factor: float, offset: float = 0.0) -> int:
        """-1 or 1 where `value` is below or above all that is usual, else 0.

        Args:
            value: Compared as log(`offset` + value), which must exist.
            factor: What a difference that matters exceeds.
            offset: As in the logarithms that the median is of.
        """
        if math.isnan(self.median):
            return 0
        away = math.log(offset + value) - self.median
        ratio = value / self.value(offset)
        if abs(away) <= SPREADS * self.spread or 1 / factor < ratio < factor:
            return 0
        return 1 if away > 0 else -1

    def value(self, offset: float = 0.0) -> float:
        """The median itself."""
        return math.exp(self.median) - offset


def write(target: Path, slide_ids: list[str]) -> dict[str, float]:
    """Write the tables from `target/<slide>/tally.json`, and warn of the slides that stand out.

    Returns:
        The stage's metrics.
    """
    tallies = {slide_id: tally.read(target / slide_id) for slide_id in slide_ids}
    flags = find(tallies)
    rows = [_row(slide_id, one, flags[slide_id]) for slide_id, one in tallies.items()]
    _write_csv(target / "slides.csv", list(rows[0]) if rows else [], map(dict.values, rows))
    patches = _sum(one.per_patch for one in tallies.values())
    _write_csv(target / "nuclei_per_patch.csv", ["nuclei", "patches"], patches)
    bins = _sum(one.radius_bins for one in tallies.values())
    radii = ((at * RADIUS_BIN_UM, (at + 1) * RADIUS_BIN_UM, nuclei) for at, nuclei in bins)
    _write_csv(target / "radius.csv", ["from_um", "to_um", "nuclei"], radii)
    flagged = {slide_id: found for slide_id, found in flags.items() if found}
    _warn(flagged, len(tallies), target / "slides.csv")
    return {**_totals(list(tallies.values())), "slides_flagged": len(flagged)}


def find(tallies: dict[str, Tally]) -> dict[str, dict[str, str]]:
    """For each slide its flags: a word or two, and a sentence that says what, and what to check."""
    filled = [one for one in tallies.values() if one.nuclei]
    counts = _usual([math.log1p(one.nuclei / one.patches) for one in filled])
    measured = [one.radius_um["p50"] for one in filled if one.nuclei >= RADIUS_NUCLEI]
    radii = _usual([math.log(radius) for radius in measured])
    return {
        slide_id: {**_count_flag(one, counts), **_radius_flag(one, radii)}
        for slide_id, one in tallies.items()
    }


def _usual(values: list[float]) -> Usual:
    if len(values) < COHORT:
        return Usual(math.nan, math.nan)
    median = float(np.median(values))
    return Usual(median, 1.4826 * float(np.median(np.abs(np.array(values) - median))))


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
    return {word: f"{found}{known}: {CHECKS[word]}."}


def _radius_flag(one: Tally, usual: Usual) -> dict[str, str]:
    if one.nuclei < RADIUS_NUCLEI:
        return {}
    radius = one.radius_um["p50"]
    side = usual.side(radius, RADIUS_FACTOR)
    known = f"where {usual.value():.3g} µm is usual in this cohort" if side else ""
    if not RADII_UM[0] <= radius <= RADII_UM[1]:
        side = 1 if radius > RADII_UM[1] else -1
        known = known or "where {:.3g} to {:.3g} µm occur in cells".format(*RADII_UM)
    if not side:
        return {}
    word = "small nuclei" if side < 0 else "large nuclei"
    return {word: f"The median radius is {radius:.3g} µm, {known}: {CHECKS[word]}."}


def _row(slide_id: str, one: Tally, flags: dict[str, str]) -> dict[str, Any]:
    return {
        "slide_id": slide_id,
        "patches": one.patches,
        "nuclei": one.nuclei,
        "nuclei_per_patch": round(one.nuclei / one.patches, 4) if one.patches else 0.0,
        "empty_share": round(one.per_patch.get(0, 0) / one.patches, 4) if one.patches else 0.0,
        **{f"radius_{name}_um": one.radius_um.get(name, "") for name in QUANTILES},
        "flags": ", ".join(flags),
        "why": " ".join(flags.values()),
    }


def _totals(tallies: list[Tally]) -> dict[str, float]:
    patches = sum(one.patches for one in tallies)
    nuclei = sum(one.nuclei for one in tallies)
    return {
        "slides": len(tallies),
        "patches": patches,
        "nuclei": nuclei,
        "nuclei_per_patch": nuclei / patches if patches else 0.0,
        "patches_without_nuclei": sum(one.per_patch.get(0, 0) for one in tallies),
    }


def _sum(parts: Iterable[dict[int, int]]) -> list[tuple[int, int]]:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return sorted(total.items())


def _write_csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(header)
        writer.writerows(rows)


def _warn(flagged: dict[str, dict[str, str]], slides: int, table: Path) -> None:
    if not flagged:
        return
    lines = [f"{slide_id}: {' '.join(why.values())}" for slide_id, why in flagged.items()]
    more = len(lines) - LISTED
    lines[LISTED:] = [f"and {more} more"] if more > 0 else []
    listed = "".join(f"\n  {line}" for line in lines)
    logger.warning("%d of %d slides stand out, see %s:%s", len(flagged), slides, table, listed)
