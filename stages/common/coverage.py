"""What tiling a slide gave, in a few numbers beside its patches, and in tables for the report.

coverage.json   meaning
positions       count of all places where a patch could be
with_cells      of these, foreground
out_of_focus    of these, with something in them and nothing sharp
cells           count of what was found sharp: nuclei, or stained squares
asked           patches asked for; 0: as many as there are
patches         cut
blur            positions, patches: k: how many have edges blurred by k to k + 1 times BLUR_BIN_UM
emptiness       positions, patches: k: how many have a share of glass of k to k + 1 EMPTY_BINths

slides.csv      a slide a row, with flags and why: those to look at
histograms.csv  measure, from, to, positions, patches: of the whole cohort
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from stages.common.content import Content
from stages.common.run import write_csv

logger = logging.getLogger(__name__)

FILE = "coverage.json"
BLUR_BIN_UM, BLUR_BINS = 0.25, 16  # the last bin holds all above
EMPTY_BINS = 10
WIDTHS = {"blur": BLUR_BIN_UM, "emptiness": 1 / EMPTY_BINS}
MOSTLY = 0.5  # share of what holds anything that is out of focus, in a slide that stands out
SPARSE = 0.25  # share of positions with cells; a slide that has more is only small
LISTED = 20  # slides named in the log

Bins = dict[str, dict[int, int]]


@dataclass(frozen=True)
class Coverage:
    """The first table above."""

    positions: int
    with_cells: int
    out_of_focus: int
    cells: int
    asked: int
    patches: int
    blur: Bins
    emptiness: Bins


def of(
    held: Content,
    foreground: Bool[np.ndarray, " position"],
    chosen: Int[np.ndarray, " patch"],
    cells: int,
    asked: int,
) -> Coverage:
    """Count one slide's positions.

    Args:
        held: What each position holds.
        foreground: Which count as cell-bearing.
        chosen: Indices of those that were cut.
        cells: How many were found.
        asked: Patches asked for; 0: all.
    """
    blur = np.minimum(held.blur_um / BLUR_BIN_UM, BLUR_BINS - 1)
    empty = np.clip(held.emptiness * EMPTY_BINS + 1e-9, 0, EMPTY_BINS - 1)
    return Coverage(
        positions=len(foreground),
        with_cells=int(foreground.sum()),
        out_of_focus=int((held.out_of_focus & ~foreground).sum()),
        cells=cells,
        asked=asked,
        patches=len(chosen),
        blur=_both(blur, chosen),
        emptiness=_both(empty, chosen),
    )


def _both(values: np.ndarray, chosen: np.ndarray) -> Bins:
    return {"positions": _counts(values), "patches": _counts(values[chosen])}


def _counts(values: np.ndarray) -> dict[int, int]:
    found, counts = np.unique(values[np.isfinite(values)].astype(int), return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def flags(one: Coverage) -> dict[str, str]:
    """What is odd about a slide: two or three words, and a sentence that says what to do."""
    found = {}
    sparse = one.with_cells < SPARSE * one.positions
    if sparse and one.patches < min(one.asked, one.positions):
        found["few patches"] = (
            f"{one.patches} patches of the {one.asked} asked for: {one.with_cells} of "
            f"{one.positions} positions hold cells. See in its thumbnail whether it is nearly "
            "blank or its cells were missed; tile.sampling grid with a small stride gives more."
        )
    seen = one.out_of_focus + one.with_cells
    if one.out_of_focus > MOSTLY * seen:
        found["out of focus"] = (
            f"{one.out_of_focus} of the {seen} positions that hold anything are out of focus: "
            "scan it again, or take it out of the cohort."
        )
    if not one.with_cells:
        found["no cells"] = f"None of its {one.positions} positions holds cells that were found."
    return found


def write(folder: Path, one: Coverage) -> None:
    """Write `coverage.json` into a slide's folder."""
    (folder / FILE).write_text(json.dumps(asdict(one)) + "\n", encoding="utf-8")


def read(folder: Path) -> Coverage:
    """Read a slide's `coverage.json`.

    Raises:
        FileNotFoundError: the slide has none.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `dvc repro tile`")
    values = json.loads(file.read_text(encoding="utf-8"))
    for measure in WIDTHS:  # JSON has text for keys
        values[measure] = {
            of_what: {int(key): count for key, count in bins.items()}
            for of_what, bins in values[measure].items()
        }
    return Coverage(**values)


def write_tables(target: Path, slide_ids: list[str]) -> dict[str, int]:
    """Write the tables from `target/<slide>/coverage.json`, and warn of slides that stand out.

    Returns:
        The stage's metrics.
    """
    found = {slide_id: read(target / slide_id) for slide_id in slide_ids}
    flagged = {slide_id: flags(one) for slide_id, one in found.items()}
    rows = [_row(slide_id, one, flagged[slide_id]) for slide_id, one in found.items()]
    write_csv(target / "slides.csv", list(rows[0]), map(dict.values, rows))
    header = ["measure", "from", "to", "positions", "patches"]
    write_csv(target / "histograms.csv", header, _histograms(list(found.values())))
    _warn({name: why for name, why in flagged.items() if why}, len(found), target / "slides.csv")
    return {
        "slides": len(found),
        "patches": sum(one.patches for one in found.values()),
        "fewest_patches": min(one.patches for one in found.values()),
        "slides_with_few_patches": sum("few patches" in why for why in flagged.values()),
        "slides_out_of_focus": sum("out of focus" in why for why in flagged.values()),
    }


def _row(slide_id: str, one: Coverage, why: dict[str, str]) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(one).items() if key not in WIDTHS}
    told = {"flags": ", ".join(why), "why": " ".join(why.values())}
    return {"slide_id": slide_id, **plain, **told}


def _histograms(found: list[Coverage]) -> Iterable[list[float | str]]:
    for measure, width in WIDTHS.items():
        counts = {"positions": Counter[int](), "patches": Counter[int]()}
        for one in found:
            for of_what, bins in getattr(one, measure).items():
                counts[of_what].update(bins)
        for at in sorted(counts["positions"]):
            ends = (round(at * width, 4), round((at + 1) * width, 4))
            yield [measure, *ends, counts["positions"][at], counts["patches"][at]]


def _warn(flagged: dict[str, dict[str, str]], slides: int, table: Path) -> None:
    if not flagged:
        return
    lines = [f"{slide_id}: {' '.join(why.values())}" for slide_id, why in flagged.items()]
    more = len(lines) - LISTED
    lines[LISTED:] = [f"and {more} more"] if more > 0 else []
    listed = "".join(f"\n  {line}" for line in lines)
    logger.warning("%d of %d slides stand out, see %s:%s", len(flagged), slides, table, listed)
