"""Stage 0, index: what lies in the user's slide folder, by name, length and time.

    reads   the folder named in `cohort.folder`, when `cohort.source` is folder
    writes  data/index/slides.csv

It runs at every `dvc repro`, in a fraction of a second, so that DVC sees a slide that was added,
removed or replaced without reading terabytes. It imports the standard library and our params only.
"""

import os
from pathlib import Path

from stages.common import cohort, params, run


def main() -> None:
    """List the folder's files; an empty list for sources that have no folder."""
    chosen = params.section_of("cohort")
    target = Path("data/index/slides.csv")
    lines = ["path,bytes,mtime_ns"]
    if chosen.get("source") == "folder":
        settings = params.section_of("cohort.folder")
        folder = cohort.locate(str(settings.get("slides")))
        labels = cohort.locate(str(settings.get("labels")))
        lines += [_line(file, str(file.relative_to(folder))) for file in _files(folder)]
        lines += [_line(labels, "labels")] if labels.is_file() else []
    with run.atomic(target) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    walked = os.walk(folder, followlinks=True)
    return sorted(Path(place) / name for place, _, names in walked for name in names)


def _line(file: Path, name: str) -> str:
    status = file.stat()
    quoted = name.replace('"', '""')
    return f'"{quoted}",{status.st_size},{status.st_mtime_ns}'


if __name__ == "__main__":
    run.start(main)
