"""Every file below a folder."""

import os
from pathlib import Path


def below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder, and the folders that this user may not look into.

    Links are followed, each place once.
    """
    found: list[Path] = []
    closed: list[Path] = []
    seen = set()
    for place, inner, names in os.walk(
        folder, followlinks=True, onerror=lambda error: closed.append(Path(error.filename))
    ):
        if not os.access(place, os.X_OK):  # its names are told, and nothing of what they name
            closed.append(Path(place))
            inner.clear()
            continue
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [Path(place) / name for name in names if os.path.isfile(os.path.join(place, name))]
    return sorted(found), sorted(closed)
