"""Checkpoints of a run: whole or absent, the last few kept, and a way to stop at one.

    <folder>/step-000000040.pt   all that the rest of a run depends on, after 40 steps
    <folder>/finished.pt         what is still wanted of a run that came to its end

`torch.load(file, weights_only=True)` reads both: a map of `step`, `made` (what decides the run) and
the state of each part. Random numbers have no state to keep: each is a hash of the run's seed, the
step and what it is for, and so is the order of the patches.
"""

import errno
import io
import logging
import os
import pickle
import signal
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from stages.common import run
from stages.common.ranks import Ranks

logger = logging.getLogger(__name__)

FINISHED = "finished.pt"
STALE_SECONDS = 3600  # a half-written file of this age has lost its writer
# What zip and unpickling raise on bytes that are not those that were written.
DAMAGED = (
    *(RuntimeError, EOFError, KeyError, TypeError, ValueError, OverflowError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, zlib.error),
)


class Part(Protocol):
    """A module, an optimizer or whatever else has a state."""

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go back to a state."""
        ...


Parts = dict[str, Part]


def save(folder: Path, step: int, parts: Parts, made: dict[str, Any], keep: int) -> None:
    """Write the state of all parts after `step` steps, then drop all but the newest `keep`."""
    written = folder / f"step-{step:09d}.pt"
    _write(written, step, parts, made)
    for old in found(folder)[:-keep]:
        if old != written:  # files of later steps are another's, and no reason to lose this one
            old.unlink(missing_ok=True)


def finish(folder: Path, step: int, parts: Parts, made: dict[str, Any]) -> None:
    """Write what outlives the run, then drop its checkpoints."""
    _write(folder / FINISHED, step, parts, made)
    _drop(folder)


def _drop(folder: Path) -> None:
    for old in found(folder):
        old.unlink(missing_ok=True)


def _write(path: Path, step: int, parts: Parts, made: dict[str, Any]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    with run.atomic(path) as temporary, temporary.open("wb") as opened:
        written = io.BytesIO()  # torch's writer hides a full disk behind an error of its own
        torch.save({"step": step, "made": made, **state}, written)
        opened.write(written.getbuffer())
        opened.flush()
        os.fsync(opened.fileno())  # the name must not reach the disk before the bytes


def finished(folder: Path, parts: Parts, made: dict[str, Any]) -> bool:
    """Whether the run has ended; its end is then put into all parts.

    Checkpoints that it left when it was killed while it ended are dropped.
    """
    state = _newest([folder / FINISHED], made)
    if state is None:
        return False
    for name, part in parts.items():
        part.load_state_dict(state[name])
    _drop(folder)
    return True


def resume(folder: Path, parts: Parts, made: dict[str, Any], ranks: Ranks) -> int:
    """Put the newest state into all parts and return its step: 0 if there is none.

    A damaged file is removed, with a warning, and the one before it is taken.

    Raises:
        OSError: a file could not be read; that is no damage.
        ValueError: the state is of another run.
        FileNotFoundError: a machine does not see the file that the first rank found.
    """
    state = None
    if ranks.first:
        _sweep(folder)
        state = _newest(found(folder)[::-1], made)
    step = ranks.agreed(state["step"] if state else 0)
    if not step:
        return 0
    if state is None:
        state = _of_first_rank(folder / f"step-{step:09d}.pt")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("going on after step %d, from %s", step, folder)
    return step


def _newest(paths: list[Path], made: dict[str, Any]) -> dict[str, Any] | None:
    """The first of `paths` that is there and whole; damaged ones before it are removed."""
    damaged = False
    for path in paths:
        if not path.is_file():
            continue
        state = _whole(path)
        if state is not None:
            _check(state["made"], made, path)
            return state
        damaged = True
        path.unlink(missing_ok=True)
    if damaged and not found(paths[0].parent):
        folder = paths[0].parent
        logger.warning("no whole checkpoint is left in %s: starting at step 0", folder)
    return None


def _whole(path: Path) -> dict[str, Any] | None:
    """What a file holds; None if it is not what was written, with a warning."""
    try:
        return _read(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged file may name a place before its beginning
            raise
        kind = type(error).__name__
    except DAMAGED as error:  # whose texts advise to trust the file
        kind = type(error).__name__
    logger.warning("%s is damaged (%s) and is removed", path, kind)
    return None


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch does not look at the check sums that it writes
        if archive.testzip():
            raise zipfile.BadZipFile
    # To the CPU: parts move what they take to where they are, and there is memory for both.
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not {"step", "made"} <= state.keys():
        raise ValueError("no checkpoint")
    return state


def _of_first_rank(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"the first process goes on from {path} and this machine has no such file: let "
            "CYTOSSL_CACHE be a folder that all machines share"
        )
    return _read(path)


def _check(there: dict[str, Any], made: dict[str, Any], path: Path) -> None:
    """Refuse what was made by other settings, data or code."""
    before, now = ({**_flat(values), "run": ""} for values in (there, made))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        told = "; ".join(f"{key}: {before.get(key)} there, {now.get(key)} here" for key in keys)
        raise ValueError(f"{path} is of another run ({told}): move it out of that folder")


def _flat(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Nested maps as one, of dotted keys; lists and tuples are alike."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{place}{key}.") if inner else {f"{place}{key}": value}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
            leftover.unlink(missing_ok=True)


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted(folder.glob("step-*.pt"))


@contextmanager
def interruptible(ranks: Ranks) -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to, in place of what they do; a second one does.

    With several ranks a second one is noted too: batch systems signal torchrun and its processes,
    and torchrun passes its own on. It kills those that take longer than half a minute.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        if ranks.count == 1:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int, step: int, total: int) -> None:
    """End the process as the signal would have, in its own words."""
    name = signal.Signals(number).name
    logger.error("stopped by %s after step %d of %d: run again to go on there", name, step, total)
    raise SystemExit(128 + number)
