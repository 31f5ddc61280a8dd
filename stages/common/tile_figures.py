"""The report's section on slides and patches: what stages/common/coverage.py counted, drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from stages.common import coverage, figures
from stages.common.coverage import BLUR_BIN_UM, BLUR_BINS, EMPTY_BINS

FLAGGED_SHOWN, OTHERS_SHOWN = 24, 60
LARGE, SMALL = (480, figures.QUALITY), (160, 70)  # thumbnails: width in px, JPEG's quality
BINS = {"blur": BLUR_BINS, "emptiness": EMPTY_BINS}
LABELS = {
    "blur": ("blur of edges, sigma in µm", BLUR_BIN_UM),
    "emptiness": ("share of bare glass", 1 / EMPTY_BINS),
}


def section(folder: Path, shown: list[str]) -> dict[str, Any]:
    """Plots, a table, slides that stand out, those of `shown`, and some others, of `data/tile`.

    Raises:
        FileNotFoundError: a table or a thumbnail is missing.
    """
    slides = _read(folder / "slides.csv")
    worst = slides.sort_values(["with_cells", "slide_id"])
    flagged = worst[worst["flags"] != ""].to_dict("records")
    histograms = _read(folder / "histograms.csv")
    pictured = {*shown, *(row["slide_id"] for row in flagged[:FLAGGED_SHOWN])}
    others = spread([name for name in slides["slide_id"] if name not in pictured])
    return {
        "slides": len(slides),
        "each": slides.to_dict("records"),
        "flagged": len(flagged),
        "odd": [{**row, **picture(folder, row["slide_id"])} for row in flagged[:FLAGGED_SHOWN]],
        "shown": {slide_id: picture(folder, slide_id) for slide_id in shown},
        "others": {slide_id: picture(folder, slide_id, SMALL) for slide_id in others},
        "pictured": len(pictured) + len(others),
        "cohort": {measure: histogram(histograms, measure) for measure in BINS},
    }


def spread(names: list[str]) -> list[str]:
    """At most OTHERS_SHOWN of them, evenly spread."""
    count = min(OTHERS_SHOWN, len(names))
    return [names[at] for at in np.linspace(0, len(names) - 1, count).astype(int)]


def picture(folder: Path, slide_id: str, form: tuple[int, int] = LARGE) -> dict[str, Any]:
    """A slide's thumbnail and the bars of its histograms."""
    one = coverage.read(folder / slide_id)
    return {
        "source": figures.picture(_need(folder / slide_id / "thumbnail.jpg"), *form),
        "bars": {measure: bars(getattr(one, measure), count) for measure, count in BINS.items()},
        "coverage": one,
    }


def bars(bins: coverage.Bins, count: int) -> list[tuple[float, float]]:
    """Heights, 0 to 1, of all positions and of the patches, each over its own highest."""
    columns = [
        [bins[of_what].get(at, 0) for at in range(count)] for of_what in ("positions", "patches")
    ]
    return list(zip(*([n / max(1, *column) for n in column] for column in columns), strict=True))


def histogram(table: pd.DataFrame, measure: str) -> Markup:
    """Shares of all positions and of the patches by blur or emptiness, of the whole cohort."""
    figure, axes = figures.blank(3.6, 2.4)
    mine = table[table.measure == measure]
    label, width = LABELS[measure]
    at = np.rint(mine["from"] / width).astype(int)
    for of_what, color in zip(("positions", "patches"), figures.COLORS, strict=False):
        counts = np.bincount(at, mine[of_what], minlength=BINS[measure])
        shares = counts / max(1, counts.sum())
        edges = np.arange(BINS[measure] + 1) * width
        axes.stairs(shares, edges, color=color, linewidth=1.5, label=of_what)
    axes.set(xlabel=label, ylabel="share", ylim=(0, None))
    axes.legend(frameon=False, labelcolor=figures.INK)
    return figures.svg(figure, f"tile-{measure}")


def _need(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `dvc repro tile`")
    return path


def _read(path: Path) -> pd.DataFrame:
    texts = dict.fromkeys(["slide_id", "flags", "why", "measure"], str)
    # An id may be written NA: empty cells of text stay text.
    table = pd.read_csv(_need(path), dtype=texts, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in table if name not in texts})
