"""Detection in tables for the report, and sentences for the user about what stands out.

slides.csv            a slide a row: counts, radii, flags and why (stages/common/flags.py)
overall.csv           flag, why: of all slides together
nuclei_per_patch.csv  nuclei, patches: patches of the whole cohort that hold so many nuclei
radius.csv            from_um, to_um, nuclei: radii of the whole cohort
"""

import logging
from pathlib import Path
from typing import Any

from stages.common import flags, tally
from stages.common.run import write_csv
from stages.common.tally import QUANTILES, RADIUS_BIN_UM, Tally

logger = logging.getLogger(__name__)

LISTED = 20  # slides named in the log


def write(target: Path, slide_ids: list[str]) -> dict[str, float]:
    """Write the tables from `target/<slide>/tally.json`, and warn of the slides that stand out.

    Returns:
        The stage's metrics.
    """
    tallies = {slide_id: tally.read(target / slide_id) for slide_id in slide_ids}
    together = tally.total(list(tallies.values()))
    found = flags.find(tallies)
    overall = flags.overall(tallies, found)
    rows = [_row(slide_id, one, found[slide_id]) for slide_id, one in tallies.items()]
    write_csv(target / "slides.csv", list(rows[0]) if rows else [], map(dict.values, rows))
    write_csv(target / "overall.csv", ["flag", "why"], overall.items())
    patches = together.per_patch.items()
    write_csv(target / "nuclei_per_patch.csv", ["nuclei", "patches"], patches)
    bins = together.radius_bins.items()
    radii = ((at * RADIUS_BIN_UM, (at + 1) * RADIUS_BIN_UM, nuclei) for at, nuclei in bins)
    write_csv(target / "radius.csv", ["from_um", "to_um", "nuclei"], radii)
    flagged = {slide_id: why for slide_id, why in found.items() if why}
    if overall:
        logger.warning("all %d slides together: %s", len(tallies), " ".join(overall.values()))
    _warn(flagged, len(tallies), target / "slides.csv")
    return {
        "slides": len(tallies),
        **_totals(together),
        "slides_flagged": len(flagged),
        "cohort_flags": len(overall),
    }


def _row(slide_id: str, one: Tally, found: dict[str, str]) -> dict[str, Any]:
    return {
        "slide_id": slide_id,
        "patches": one.patches,
        "nuclei": one.nuclei,
        "nuclei_per_patch": round(one.nuclei / one.patches, 4) if one.patches else 0.0,
        "empty_share": round(one.per_patch.get(0, 0) / one.patches, 4) if one.patches else 0.0,
        **{f"radius_{name}_um": one.radius_um.get(name, "") for name in QUANTILES},
        "flags": ", ".join(found),
        "why": " ".join(found.values()),
    }


def _totals(one: Tally) -> dict[str, float]:
    return {
        "patches": one.patches,
        "nuclei": one.nuclei,
        "nuclei_per_patch": one.nuclei / one.patches if one.patches else 0.0,
        "patches_without_nuclei": one.per_patch.get(0, 0),
    }


def _warn(flagged: dict[str, dict[str, str]], slides: int, table: Path) -> None:
    if not flagged:
        return
    lines = [f"{slide_id}: {' '.join(why.values())}" for slide_id, why in flagged.items()]
    more = len(lines) - LISTED
    lines[LISTED:] = [f"and {more} more"] if more > 0 else []
    listed = "".join(f"\n  {line}" for line in lines)
    logger.warning("%d of %d slides stand out, see %s:%s", len(flagged), slides, table, listed)
