"""Slides as they come in: opened, tried at both ends, digested, and twins told apart.

Slides are opened in worker processes of this machine, as a reader that crashes on one takes its
process along; what is remembered of slides that did not change needs none.
"""

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from stages.common import (
    cluster,
    cohort,
    digests,
    dispatch,
    failures,
    fingerprint,
    params,
    readers,
    slides,
)
from stages.common.cohort import SlideRow
from stages.common.slide_files import content_files
from stages.common.workers import Workers

logger = logging.getLogger(__name__)

MPP_FACTOR = 1.6  # 0.25 and 0.26 are one scanner's; 0.25 and 0.5 are another lens, or a wrong value
READERS = 4  # threads: what they ask waits for the disk
TASKS = 1000  # at most, or handing them out takes longer than opening small pictures


class _UnknownError(Exception):
    """Nothing is remembered."""


def look(rows: list[SlideRow]) -> tuple[list[SlideRow], dict[str, str]]:
    """Open every slide, note its mpp and digest its content.

    Returns:
        The rows of the slides that can be used, and by id what is wrong with the others: they
        cannot be read, or have the content of one before them, or of one with another label.

    Raises:
        FileNotFoundError: slides vanished meanwhile; what was found out of the others is kept.
    """
    found = _recalled(rows)
    new = [row for row in rows if row.slide_id not in found]
    failed = _open_all(new) if new else {}
    _check_there([row for row in new if row.slide_id in failed])
    found |= _recalled([row for row in new if row.slide_id not in failed])
    twins: dict[str, list[SlideRow]] = defaultdict(list)
    for name in (row.slide_id for row in rows if row.slide_id not in failed):
        if name in found:
            twins[found[name].digest].append(found[name])
        else:
            failed[name] = f"slide {name} changed while it was read: run again"
    for same in twins.values():
        failed |= _without_twins(same)
    return [found[row.slide_id] for row in rows if row.slide_id not in failed], failed


def _without_twins(same: list[SlideRow]) -> dict[str, str]:
    """What to say of slides of one content but the first, or of all where their labels differ."""
    named = " and ".join(f"{row.slide_id} ({Path(row.path).name})" for row in same)
    if len({row.label for row in same}) > 1:
        labels = " and ".join(sorted({row.label for row in same}))
        why = f"have the same content, and their labels differ ({labels}): take the wrong ones out"
        return {row.slide_id: f"slides {named} {why}" for row in same}
    why = "have the same content: take one out, or it may be trained and tested on"
    return {row.slide_id: f"slides {named} {why}" for row in same[1:]}


def _check_there(failed: list[SlideRow]) -> None:
    """A slide that vanished is no bad slide: left out, it would never be looked at again."""
    gone = [row.slide_id for row in failed if not os.path.exists(cohort.locate(row.path))]
    if gone:
        raise FileNotFoundError(
            f"cohort: {len(gone)} slides vanished, {gone[0]} for one: run again when they are "
            "back; what was found out is kept"
        )


def _recalled(rows: list[SlideRow]) -> dict[str, SlideRow]:
    """The rows of slides that were opened before and did not change, by id."""
    with ThreadPoolExecutor(READERS) as pool:
        return {row.slide_id: row for row in pool.map(_recall, rows) if row}


def _recall(row: SlideRow) -> SlideRow | None:
    try:
        found, said = _open(row, _unknown, _unknown)
        _tell_contradiction(found, said)
        return found
    except (_UnknownError, OSError, ValueError):  # a worker is to find out, and say
        return None


def _tell_contradiction(row: SlideRow, said: str) -> None:
    """Of an mpp in the labels file that is another lens's than the slide's own; the former counts.

    What a file says of itself may be wrong, and so it is no error.
    """
    if said and not 1 / MPP_FACTOR < float(row.mpp) / float(said) < MPP_FACTOR:
        logger.warning(
            "cohort: slide %s says of itself that it has an mpp of %.4g, and %.4g from the labels "
            "file is taken: correct or clear its column mpp, if that is wrong",
            *(row.slide_id, float(said), float(row.mpp)),
        )


def _unknown(*_: object) -> NoReturn:
    raise _UnknownError


def _open_all(rows: list[SlideRow]) -> dict[str, str]:
    """Open slides in processes, so that it is remembered; the error of each that failed, by id."""
    engine = replace(params.load(cluster.EngineParams, "engine"), scheduler="")
    step = -(-len(rows) // TASKS)
    tasks = [tuple(rows[at : at + step]) for at in range(0, len(rows), step)]
    bar = tqdm(total=len(rows), desc="cohort", unit="slide")
    failed = {}
    with cluster.connect(engine, len(tasks)) as client, bar:
        workers = Workers(client, engine, cuda=False)
        for task, error in dispatch.each(workers, _build, tasks, engine.retries):
            if error:  # of one slide: those of a group were tried one by one
                failed[task[0].slide_id] = failures.explain(error)
            bar.update(len(task))
    return failed


def _build(task: tuple[SlideRow, ...], _: str) -> None:
    for row in task:
        _open(row, _probed, digests.read)


def _open(
    row: SlideRow, probe: Callable[[Path, SlideRow], str], read: Callable[[Path], str]
) -> tuple[SlideRow, str]:
    """The row filled in, and the mpp that the file says of itself, empty where it does not.

    Opening and probing takes long with thousands of slides on a network: once a slide.
    """
    path = cohort.locate(row.path)
    files = content_files(path)
    question = f"mpp of {path}, {row.mpp} given, by {_reader()}"
    mpp, _, said = digests.once(files, question, lambda: probe(path, row)).partition(" ")
    return replace(row, mpp=mpp, digest=digests.digest_of(files, read)), said


def _probed(path: Path, row: SlideRow) -> str:
    with slides.Slide(path, float(row.mpp) if row.mpp else None) as slide:
        slide.probe()
        said = sum(slide.said_mpp) / 2 if slide.said_mpp else ""
        return f"{slide.mpp!r} {said}"


@functools.cache
def _reader() -> str:
    """Digest of the code that reads slides."""
    return fingerprint.code_digest((slides.__name__, *readers.modules()))
