"""Slides that failed: what is said of them, who is tried again, and the list that stages leave.

A stage that may leave slides out writes data/<stage>/failed.csv (slide_id, error), with its header
alone when none failed.
"""

import csv
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.common import cache
from stages.common.run import write_csv

FILE = "failed.csv"
HEADER = ["slide_id", "error"]
FULL = (errno.ENOSPC, errno.EDQUOT)
# What a network's disk says while it is away; it may be back.
PASSING = (
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.EBUSY),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
)
# An absolute path up to its last name: where a lab's files lie is nobody else's business.
# Names in it have no blank at either end, nor end as what stands before another path.
NAME = r"(?![\s/])[^/\n\":]*[^/\s\":'(\[=]/"
FOLDERS = re.compile(rf"(?<![^\s'\"(\[=])/(?:{NAME})+")


@dataclass(frozen=True)
class FailureParams:
    """Of the top level of params.yaml: what becomes of a slide that fails."""

    on_error: Literal["stop", "quarantine"] = "stop"  # stop: the stage fails, once all others are
    # made; quarantine: it goes on without the slide, as do all later stages


class WorkerDied(Exception):  # noqa: N818
    """A worker process ended while it had a slide."""

    def __str__(self) -> str:
        return "its worker process died, for want of memory or by a crash of the slide's reader"


def says(error: BaseException, codes: tuple[int, ...]) -> bool:
    """Whether an error is one of these, itself or as told by the library that met it."""
    return any(os.strerror(code) in str(error) for code in codes)


def check(error: BaseException) -> None:
    """Pass on what is no slide's fault.

    Raises:
        OSError: the disk is full.
    """
    if says(error, FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache.root())) from None


def explain(error: BaseException) -> str:
    """One sentence for the user."""
    plain = isinstance(error, ValueError | OSError | WorkerDied)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def write(folder: Path, failed: dict[str, str]) -> None:
    """Write failed.csv, from slide ids to errors; the header alone when none failed."""
    write_csv(
        folder / FILE,
        HEADER,
        ((name, FOLDERS.sub("", why)) for name, why in sorted(failed.items())),
    )


def read(folder: Path) -> dict[str, str]:
    """The error of each slide that the stage left out; none where it wrote no list."""
    file = folder / FILE
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        return {row["slide_id"]: row["error"] for row in csv.DictReader(opened)}
