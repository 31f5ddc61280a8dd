"""Checkpoints of a run: whole or absent, the last few kept, and a way to stop at one."""

import io
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from stages.common import run

logger = logging.getLogger(__name__)

KEPT = 2
STALE_SECONDS = 3600  # a half-written file of this age has lost its writer


class Part(Protocol):
    """A module, an optimizer or whatever else has a state."""

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go back to a state."""
        ...


def save(folder: Path, step: int, parts: dict[str, Part], kept: int = KEPT) -> None:
    """Write the state of all parts after `step` steps, then drop all but the newest `kept`."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with run.atomic(folder / f"step-{step:09d}.pt") as temporary, temporary.open("wb") as opened:
        written = io.BytesIO()  # torch's writer hides a full disk behind an error of its own
        torch.save({"step": step, **state}, written)
        opened.write(written.getbuffer())
        opened.flush()
        os.fsync(opened.fileno())  # the name must not reach the disk before the bytes
    for old in _found(folder)[:-kept]:
        old.unlink(missing_ok=True)


def resume(folder: Path, parts: dict[str, Part], device: torch.device) -> int:
    """Put the newest state into all parts and return its step: 0 if there is none."""
    for leftover in folder.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
            leftover.unlink(missing_ok=True)
    found = _found(folder)
    if not found:
        return 0
    state = torch.load(found[-1], map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("going on after step %d, from %s", state["step"], found[-1])
    return state["step"]


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to, in place of what they do; a second one does."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
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
