"""data/<stage>/results.csv: each slide's id and the key of its result.

Later stages depend on this one file, and so DVC looks at a stage's thousands of files once, as its
outputs, and not again for each stage that reads them. The key decides all that lies in a slide's
folder, pictures too (stages/common/cache.py), so that the file changes whenever they do.
"""

from pathlib import Path

from stages.common.run import write_csv

FILE = "results.csv"
HEADER = ["slide_id", "key"]


def write(folder: Path, keys: dict[str, str]) -> None:
    """Write the list, from slide ids to keys."""
    write_csv(folder / FILE, HEADER, sorted(keys.items()))
