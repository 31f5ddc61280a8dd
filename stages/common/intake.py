"""Slides as they come in: opened, tried at both ends, digested, and twins told apart."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from stages.common import cohort, digests, fingerprint, readers, slides
from stages.common.cohort import SlideRow
from stages.common.slide_files import content_files

READERS = 4  # threads: hashing and opening wait for the disk


def look(rows: list[SlideRow]) -> tuple[list[SlideRow], dict[str, str]]:
    """Open every slide, note its mpp and digest its content.

    Returns:
        The rows of the slides that can be used, and by id what is wrong with the others: they
        cannot be read, or have the content of one before them.
    """
    with ThreadPoolExecutor(READERS) as pool:
        results = list(
            tqdm(pool.map(_caught(_open), rows), total=len(rows), desc="cohort", unit="slide")
        )
    pairs = list(zip(rows, results, strict=True))
    failed = {row.slide_id: found for row, found in pairs if isinstance(found, str)}
    first: dict[str, SlideRow] = {}
    for row in results:
        if isinstance(row, str):
            continue
        one = first.setdefault(row.digest, row)
        if one is not row:
            failed[row.slide_id] = (
                f"slides {one.slide_id} ({one.path}) and {row.slide_id} ({row.path}) have the same "
                "content: take one out, or it may be trained and tested on"
            )
    return list(first.values()), failed


def _open(row: SlideRow) -> SlideRow:
    """Opening and probing takes long with thousands of slides on a network: once a slide."""
    path = cohort.locate(row.path)
    files = content_files(path)
    question = f"mpp of {path}, {row.mpp} given, by {_reader()}"
    mpp = digests.once(files, question, lambda: _probed(path, row))
    return replace(row, mpp=mpp, digest=digests.digest_of(files))


def _probed(path: Path, row: SlideRow) -> str:
    with slides.Slide(path, float(row.mpp) if row.mpp else None) as slide:
        slide.probe()
        return repr(slide.mpp)


@functools.cache
def _reader() -> str:
    """Digest of the code that reads slides."""
    return fingerprint.code_digest((slides.__name__, *readers.modules()))


def _caught(task: Callable[[SlideRow], SlideRow]) -> Callable[[SlideRow], SlideRow | str]:
    def attempt(row: SlideRow) -> SlideRow | str:
        try:
            return task(row)
        except (ValueError, OSError, ImportError) as error:
            return str(error)

    return attempt
