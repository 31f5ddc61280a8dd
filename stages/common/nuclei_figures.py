"""The report's section on nuclei: what detect's tables (stages/common/quality.py) say, drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.markers import CARETDOWN
from matplotlib.ticker import MaxNLocator

from stages.common import figures

# Counts are skewed: most patches hold a few, some hundreds. Bars for 0, 1, ... and wider classes.
CLASSES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
FLAGGED_SHOWN = 24
TICKS = [0, *(step * 10**power for power in range(6) for step in (1, 2, 5))]
BAR, ODD = figures.COLORS[0], figures.COLORS[1]


def section(folder: Path) -> dict[str, Any]:
    """Plots, and the slides that stand out, from `data/detect`.

    Raises:
        FileNotFoundError: a table or an overlay is missing.
    """
    slides = _read(folder / "slides.csv")
    flagged = slides[slides["flags"] != ""].to_dict("records")
    return {
        "slides": len(slides),
        "overall": _read(folder / "overall.csv").to_dict("records"),
        "flagged": len(flagged),
        "per_patch": per_patch(_read(folder / "nuclei_per_patch.csv")),
        "per_slide": per_slide(slides),
        "radius": radius(_read(folder / "radius.csv")),
        "odd": [
            {**row, "source": figures.picture(_need(folder / row["slide_id"] / "overlay.jpg"), 400)}
            for row in flagged[:FLAGGED_SHOWN]
        ],
    }


def per_patch(table: pd.DataFrame) -> Markup:
    """Histogram of nuclei per patch, a bar for each of CLASSES; columns nuclei and patches."""
    figure, axes = figures.blank(3.6, 2.4)
    most = int(table.nuclei.max()) if len(table) else 0
    edges = [low for low in CLASSES if low <= most]
    counts = np.histogram(table.nuclei, [*edges, math.inf], weights=table.patches)[0]
    axes.bar(np.arange(len(edges)), counts, width=0.9, color=BAR)
    axes.set_xticks(np.arange(len(edges)), _labels(edges), rotation=90 if len(edges) > 8 else 0)
    axes.set(xlabel="nuclei in a patch", ylabel="patches")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figures.svg(figure, "per-patch")


def _labels(edges: list[int]) -> list[str]:
    """Of classes that begin there: 5, 6–7, 1000+."""
    ends = [low - 1 for low in CLASSES[1 : len(edges) + 1]]
    closed = [
        str(low) if low == high else f"{low}–{high}" for low, high in zip(edges, ends, strict=False)
    ]
    return [*closed, f"{CLASSES[-1]}+"][: len(edges)]


def per_slide(slides: pd.DataFrame) -> Markup:
    """Nuclei per patch of every slide in rising order, those with flags in another colour.

    The axis is that of log(1 + n), in which slides are compared.
    """
    figure, axes = figures.blank(3.6, 2.4)
    ranked = slides.sort_values(["nuclei_per_patch", "slide_id"])
    values, odd = ranked.nuclei_per_patch.to_numpy(), (ranked["flags"] != "").to_numpy()
    edges = np.arange(len(values) + 1) + 0.5
    _bars(axes, edges, values)
    _bars(axes, edges, np.where(odd, values, np.nan), color=ODD)
    at = np.flatnonzero(odd)
    pointing = {"marker": CARETDOWN, "linestyle": "", "color": ODD, "clip_on": False}
    axes.plot(at + 1, values[at], **pointing, label="stands out")
    axes.set_yscale("function", functions=(np.log1p, np.expm1))
    axes.set_yticks([tick for tick in TICKS if tick <= max(1, values.max())])
    axes.set(xlabel="slides in rising order", ylabel="nuclei per patch", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if odd.any():
        axes.legend(frameon=False, labelcolor=figures.INK, loc="upper left")
    return figures.svg(figure, "per-slide")


def radius(table: pd.DataFrame) -> Markup:
    """Histogram of radii; columns from_um, to_um and nuclei, rows without nuclei left out."""
    figure, axes = figures.blank(3.6, 2.4)
    if len(table):
        width = float(table.to_um[0] - table.from_um[0])
        bins = np.rint(table.from_um / width).astype(int)
        counts = np.bincount(bins - bins.min(), weights=table.nuclei)
        _bars(axes, (np.arange(len(counts) + 1) + bins.min()) * width, counts)
    axes.set(xlabel="radius, µm", ylabel="nuclei")
    return figures.svg(figure, "radius")


def _bars(axes: Axes, edges: np.ndarray, heights: np.ndarray, color: str = BAR) -> None:
    """All bars as one shape: a thousand of them must not weigh the page down."""
    axes.stairs(heights, edges, fill=True, color=color, linewidth=0)


def _need(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `dvc repro detect`")
    return path


def _read(path: Path) -> pd.DataFrame:
    texts = ["slide_id", "flag", "flags", "why"]
    # An id may be written NA: empty cells of text stay text.
    table = pd.read_csv(_need(path), dtype=dict.fromkeys(texts, str), keep_default_na=False)
    numbers = [name for name in table if name not in texts]
    return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})
