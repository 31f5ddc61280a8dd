"""data/<stage>/results.csv: each slide's id and the key of its result.

Later stages depend on this one file, and so DVC looks at a stage's thousands of files once, as its
outputs, and not again for each stage that reads them. The key decides all that lies in a slide's
folder, pictures too (stages/common/cache.py), so that the file changes whenever they do.
"""

import csv
from pathlib import Path

from stages.common.run import atomic

FILE = "results.csv"
HEADER = ["slide_id", "key"]


def write(folder: Path, keys: dict[str, str]) -> None:
    """Write the list, from slide ids to keys."""
    with (
        atomic(folder / FILE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as opened,
    ):
        writer = csv.writer(opened)
        writer.writerow(HEADER)
        writer.writerows(sorted(keys.items()))
