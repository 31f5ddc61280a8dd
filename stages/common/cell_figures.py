"""The report's section on evaluation: Table 1, comparisons, and the curves of each head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from stages.common import curves, figures, table1

TESTS = {"delong": "DeLong's test", "resampled_t": "the corrected resampled t-test over folds"}
COUNTS = {
    "slides_test": "test slides",
    "patients_test": "their patients",
    "splits": "splits",
    "seeds": "seeds",
}
MORE = {  # columns of the second table
    "ap": "Average precision",
    "auc_seed_sd": "AUC, SD of seeds",
    "auc_split_sd": "AUC, SD of splits",
    "ensemble_auc": "AUC of the seed ensemble",
    "specificity_at_sensitivity_95": "Specificity, screening",
    "recall_at_sensitivity_95": "its recall",
    "majority_accuracy": "Majority class",
    "brier": "Brier",
    "brier_scaled": "Brier, scaled",
    "ece": "ECE",
    "ece_scaled": "ECE, scaled",
}
Curves = dict[str, pd.DataFrame]  # by encoder


def section(data: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page tells of the cells, from `data/compare` and `data/evaluate`.

    Args:
        data: Folder of the stages.
        cells: encoder, head and metrics (the content of metrics.json) of each.

    Raises:
        FileNotFoundError: a table is missing; the message names its stage.
    """
    table = _read(data / "compare" / "table1.csv", "compare")
    found = _read(data / "compare" / "comparisons.csv", "compare")
    names = table1.figures_of(table)
    last = table1.last_place(table)
    caption = _need(data / "compare" / "table1.md", "compare").read_text(encoding="utf-8")
    encoders, heads = (
        list(dict.fromkeys(cell[key] for cell in cells)) for key in ("encoder", "head")
    )
    return {
        "caption": caption.partition("\n")[0],
        "titles": [table1.title(name) for name in names],
        "rows": [_table_row(row, names, last) for _, row in table.iterrows()],
        "comparisons": [_comparison(row) for row in found.to_dict("records")],
        "test": TESTS[found["test"].iloc[0]] if len(found) else "",
        **_more(cells),
        "panels": [panel(data / "evaluate", encoders, head) for head in heads],
    }


def _more(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the second table: figures that some protocols have and some have not."""
    plain = [
        {name.removeprefix(table1.OPTIMISTIC): value for name, value in cell["metrics"].items()}
        for cell in cells
    ]
    optimistic = any(table1.OPTIMISTIC + "auc" in cell["metrics"] for cell in cells)
    names = [name for name in MORE if any(name in figures for figures in plain)]
    return {
        "counts": {title: int(plain[0][name]) for name, title in COUNTS.items()},
        "optimistic": " (optimistic)" * optimistic,
        "more_titles": [MORE[name] + " (optimistic)" * optimistic for name in names],
        "more": [
            (cell, [f"{figures[name]:.3f}" if name in figures else "" for name in names])
            for cell, figures in sorted(
                zip(cells, plain, strict=True), key=lambda pair: _first(cells, pair[0]["head"])
            )
        ],
    }


def _first(cells: list[dict[str, Any]], head: str) -> int:
    """Where a head stands first: Table 1 is sorted by heads."""
    return [cell["head"] for cell in cells].index(head)


def _table_row(row: pd.Series, names: list[str], last: int) -> dict[str, Any]:
    cells = []
    for name in names:
        mean, _, ends = table1.number(row, name).partition(" ")
        place = table1.place(row, name)
        cells.append({"mean": mean, "ends": ends, "place": place if place <= last else 0})
    sanity = row["encoder"] in table1.SANITY.values()
    return {"head": row["head"], "encoder": row["encoder"], "sanity": sanity, "cells": cells}


def _comparison(row: dict[str, Any]) -> dict[str, Any]:
    """The effect first, then p; texts of the numbers."""
    low, high = row["auc_difference_low"], row["auc_difference_high"]
    return {
        **{name: row[name] for name in ("head", "encoder", "other")},
        "effect": f"{row['auc_difference']:+.3f}",
        "ends": "" if pd.isna(low) else f"[{low:+.3f}, {high:+.3f}]",
        "p_holm": p_text(row["p_holm"]),
        "right": f"{row['only_encoder_right']} : {row['only_other_right']}",
        "p_mcnemar": p_text(row["p_mcnemar_holm"]),
    }


def p_text(p: float) -> str:
    """Three decimals; below that its bound, and a word where there is none."""
    if pd.isna(p):
        return "unknown"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def panel(folder: Path, encoders: list[str], head: str) -> dict[str, Any]:
    """ROC, precision against recall, and reliability of one head with each encoder."""
    draws = {"roc": _draw_roc, "pr": _draw_pr, "calibration": _draw_calibration}
    plots = {}
    for name, draw in draws.items():
        tables = {
            encoder: _read(folder / encoder / head / f"{name}.csv", "evaluate")
            for encoder in encoders
        }
        plots[name] = _plot(draw, tables, f"{name}-{head}")
    return {"head": head, **plots}


def _plot(draw: Callable[[Axes, Curves], None], tables: Curves, name: str) -> Markup:
    figure, axes = figures.blank(3.4, 3.3)
    draw(axes, tables)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    place = "upper left" if draw is _draw_calibration else "lower right"
    axes.legend(frameon=False, labelcolor=figures.INK, fontsize=8, loc=place)
    return figures.svg(figure, name)


def _draw_roc(axes: Axes, tables: Curves) -> None:
    axes.plot([0, 1], [0, 1], color=figures.INK, alpha=0.3, linewidth=1)
    for at, (encoder, table) in enumerate(tables.items()):
        thin = curves.thinned(table)
        axes.plot(thin.fpr, thin.tpr, **_style(at), label=encoder)
    axes.set(xlabel="False-positive rate", ylabel="True-positive rate")


def _draw_pr(axes: Axes, tables: Curves) -> None:
    for at, (encoder, table) in enumerate(tables.items()):
        thin = curves.thinned(table)
        axes.plot(thin.recall, thin.precision, **_style(at), label=encoder)
    axes.set(xlabel="Recall", ylabel="Precision")


def _draw_calibration(axes: Axes, tables: Curves) -> None:
    """Solid and large after temperature scaling, faint and small before."""
    axes.plot([0, 1], [0, 1], color=figures.INK, alpha=0.3, linewidth=1)
    for at, (encoder, table) in enumerate(tables.items()):
        for scaling, look in (
            ("before", {"alpha": 0.35, "markersize": 3, "linewidth": 1}),
            ("after", {"markersize": 5, "label": encoder}),
        ):
            of = table[table.scaling == scaling]
            axes.plot(of.predicted, of.observed, marker="o", **{**_style(at), **look})
    axes.set(xlabel="Predicted probability", ylabel="Share observed")


def _style(at: int) -> dict[str, Any]:
    turn, color = divmod(at, len(figures.COLORS))
    dash = figures.DASHES[turn % len(figures.DASHES)]
    return {"color": figures.COLORS[color], "linestyle": dash, "linewidth": 1.8}


def _read(path: Path, stage: str) -> pd.DataFrame:
    names = {"head": str, "encoder": str, "other": str}
    return pd.read_csv(_need(path, stage), dtype=names, keep_default_na=False, na_values=[""])


def _need(path: Path, stage: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `dvc repro {stage}`")
    return path
