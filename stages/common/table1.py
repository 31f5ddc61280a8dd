"""Table 1: encoders by heads with means and intervals, as a table, as Markdown and as a picture."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "recall": "Recall",
    "specificity": "Specificity",
}
INTERVALS = {
    **{"auc": "delong", "balanced_accuracy": "bootstrap"},
    **dict.fromkeys(("accuracy", "recall", "specificity"), "wilson"),
}
RANKED = ("auc", "balanced_accuracy", "accuracy")  # recall alone is won by calling all positive
SANITY = {
    "sanity_permuted_labels_auc": "(permuted labels)",
    "sanity_random_features_auc": "(random features)",
}
OPTIMISTIC = "optimistic_"
WARNING = (
    "Optimistic: epoch and threshold were chosen on the test slides. New slides will score lower."
)


def rows_of(cells: dict[tuple[str, str], dict[str, float]]) -> pd.DataFrame:
    """One row for each head and encoder, then the head's sanity rows.

    Args:
        cells: metrics.json by (encoder, head), in the order of params.yaml.

    Returns:
        Columns head, encoder, then of each figure its mean, `<figure>_low`, `<figure>_high` where
        it has an interval, and `<figure>_place` among the head's encoders (1: best; equal to three
        decimals share a place). NaN where a row has no such number. Under the protocol
        paper_optimistic each figure's name starts with `optimistic_`.
    """
    prefix = prefix_of(cells)
    found = []
    for head in dict.fromkeys(head for _, head in cells):
        of_head = {name: cell for (name, at), cell in cells.items() if at == head}
        found += [
            {"head": head, "encoder": name, **_values(cell, prefix)}
            for name, cell in of_head.items()
        ]
        found += _sanity_rows(head, list(of_head.values()), prefix)
    table = pd.DataFrame(found)
    for name in (prefix + name for name in RANKED):
        shown = table[name].where(~is_sanity(table)).round(3)
        table[f"{name}_place"] = shown.groupby(table["head"], sort=False).rank(
            "min", ascending=False
        )
    return table


def prefix_of(cells: dict[tuple[str, str], dict[str, float]]) -> str:
    """What the names of all figures start with: nothing, or `optimistic_`.

    Raises:
        ValueError: some cells are of another protocol than others.
    """
    found = {OPTIMISTIC if OPTIMISTIC + "auc" in cell else "" for cell in cells.values()}
    if len(found) > 1:
        raise ValueError(
            "some cells in data/evaluate are of the protocol paper_optimistic and some are not: "
            "run `dvc repro evaluate`"
        )
    return found.pop()


def is_sanity(table: pd.DataFrame) -> pd.Series:
    """Whether a row is no encoder's."""
    return table["encoder"].isin(SANITY.values())


def _values(cell: dict[str, float], prefix: str) -> dict[str, float]:
    found = {}
    for name in TITLES:
        if prefix + name in cell:
            found[prefix + name] = cell[prefix + name]
        for end in ("low", "high") if name in INTERVALS else ():
            key = f"{prefix}{name}_{INTERVALS[name]}_{end}"
            if key in cell:
                found[f"{prefix}{name}_{end}"] = cell[key]
    return found


def _sanity_rows(head: str, cells: list[dict[str, float]], prefix: str) -> list[dict[str, object]]:
    """The mean over the encoders of what the head scores where there is nothing to learn."""
    rows = []
    for key, name in SANITY.items():
        values = [cell[at] for cell in cells for at in (key, prefix + key) if at in cell]
        if values:
            mean = sum(values) / len(values)
            rows.append({"head": head, "encoder": name, prefix + "auc": mean})
    return rows


def figures_of(table: pd.DataFrame) -> list[str]:
    """The columns that hold a mean."""
    names = [prefix + name for prefix in ("", OPTIMISTIC) for name in TITLES]
    return [name for name in names if name in table]


def title(name: str) -> str:
    """A column's heading; one that is optimistic says so."""
    plain = name.removeprefix(OPTIMISTIC)
    return TITLES[plain] if plain == name else f"{TITLES[plain]} (optimistic)"


def number(row: pd.Series, name: str) -> str:
    """The mean and, if it has one, its interval; empty where there is no number."""
    if pd.isna(row[name]):
        return ""
    low, high = (row.get(f"{name}_{end}") for end in ("low", "high"))
    ends = "" if low is None or pd.isna(low) else f" [{low:.3f}, {high:.3f}]"
    return f"{row[name]:.3f}{ends}"


def place(row: pd.Series, name: str) -> int:
    """1 for the best of the head's encoders, 2 for the second, else 0."""
    found = row.get(f"{name}_place")
    return int(found) if found in (1, 2) else 0


def last_place(table: pd.DataFrame) -> int:
    """The last place worth a mark: of two encoders only the first, of more the second too."""
    return 2 if (~is_sanity(table)).groupby(table["head"]).sum().max() > 2 else 1


def markdown(table: pd.DataFrame, caption: str) -> str:
    """A Markdown table; the best of a head's encoders is bold, the second of several underlined."""
    names = figures_of(table)
    last = last_place(table)
    lines = [caption, "", _line(["Head", "Encoder", *(title(name) for name in names)])]
    lines.append(_line(["---", "---", *["--:"] * len(names)]))
    for _, row in table.iterrows():
        places = [at if (at := place(row, name)) <= last else 0 for name in names]
        cells = [_marked(number(row, name), at) for name, at in zip(names, places, strict=True)]
        lines.append(_line([row["head"], row["encoder"], *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _marked(text: str, at: int) -> str:
    mean, _, ends = text.partition(" ")
    marked = {1: f"**{mean}**", 2: f"<u>{mean}</u>"}.get(at, mean)
    return f"{marked} {ends}".strip()


def picture(table: pd.DataFrame, caption: str) -> Figure:
    """The table, and at its right the AUCs with their intervals on a common scale."""
    names = figures_of(table)
    width, height = 3.2 + 1.75 * len(names) + 2.6, 0.30 * (len(table) + 1) + 0.75
    figure = Figure(figsize=(width, height), layout="constrained")
    text, areas = figure.subplots(1, 2, width_ratios=[width - 2.6, 2.6], sharey=True)
    figure.suptitle(caption, fontsize=9, x=0.01, ha="left", wrap=True)
    _draw_text(text, table, names, (width - 2.6))
    _draw_areas(areas, table, names[0])
    text.set_ylim(len(table) - 0.4, -1.6)
    return figure


def _draw_text(axes: Axes, table: pd.DataFrame, names: list[str], width_in: float) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, width_in)
    columns = [0.0, 1.3, *(3.2 + 1.75 * at + 1.65 for at in range(len(names)))]
    headings = ["Head", "Encoder", *(title(name) for name in names)]
    for at, (x, heading) in enumerate(zip(columns, headings, strict=True)):
        side = "left" if at < 2 else "right"
        _write(axes, x, -1.0, heading.replace(" (", "\n("), side, "bold")
    axes.axhline(-0.5, color="black", linewidth=0.8)
    before = None
    for y, (_, row) in enumerate(table.iterrows()):
        if row["head"] != before and y:
            axes.axhline(y - 0.5, color="#d9dde1", linewidth=0.8)
        _write(axes, 0, y, row["head"] if row["head"] != before else "", "left", "normal")
        _write(axes, 1.3, y, row["encoder"], "left", "normal")
        for x, name in zip(columns[2:], names, strict=True):
            weight = "bold" if place(row, name) == 1 else "normal"
            _write(axes, x, y, number(row, name), "right", weight)
        before = row["head"]


def _write(axes: Axes, x: float, y: float, text: str, side: str, weight: str) -> None:
    style = {"fontsize": 8, "va": "center", "ha": side, "fontweight": weight}
    axes.text(x, y, text, parse_math=False, **style)


def _draw_areas(axes: Axes, table: pd.DataFrame, name: str) -> None:
    for y, (_, row) in enumerate(table.iterrows()):
        dull = row["encoder"] in SANITY.values()
        color = "#9aa3ad" if dull else "#0072b2"
        axes.plot(row[name], y, "o", color=color, markersize=4)
        low, high = (row.get(f"{name}_{end}") for end in ("low", "high"))
        if low is not None and not pd.isna(low):
            axes.plot([low, high], [y, y], color=color, linewidth=1.5)
    axes.axvline(0.5, color="#9aa3ad", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelleft=False, labelsize=8)
    axes.set_xlabel(f"{title(name)}, 95 % interval", fontsize=8)
