"""data/cohort/outliers.csv: slides whose mpp is far from the cohort's; the header alone if none."""

import csv
from pathlib import Path

from stages.common.run import write_csv

FILE = "outliers.csv"
HEADER = ["slide_id", "mpp", "usual"]  # microns per pixel; usual: the cohort's median


def write(folder: Path, rows: list[tuple[str, float, float]]) -> None:
    """Write the list: slide id, its mpp, the usual one."""
    write_csv(
        folder / FILE, HEADER, ((name, f"{mpp:.4g}", f"{usual:.4g}") for name, mpp, usual in rows)
    )


def read(folder: Path) -> list[dict[str, str]]:
    """The rows by column; none where there is no list."""
    file = folder / FILE
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))
