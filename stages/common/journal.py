"""The curves of a run: rows of numbers that checkpoints keep and DVCLive shows."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from dvclive import Live

T = TypeVar("T")

# What was measured of this machine: no two runs agree in it.
MEASURED = ("images_per_second", "data_wait_share", "gpu_memory_gb")


class Journal:
    """A row every so many steps; after a resume the folder shows the rows before it as well.

    Args:
        folder: For DVCLive, which empties it; None: rows are kept and not shown.
        every: Steps between two rows.
        last: Number of the last step, which has a row in any case.
        epoch: Steps that `summary` looks back on.
    """

    def __init__(self, folder: Path | None, every: int, last: int, epoch: int) -> None:
        self.live = folder and Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False)
        self.every, self.last = every, last
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last row
        self.norms: list[float] = []
        self.newest: deque[tuple[float, float]] = deque(maxlen=epoch)  # loss and norm of a step
        self._restart()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.end()

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; how long each was waited for counts as waiting for data."""
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield item

    def note(self, loss: float, norm: float, patches: int) -> None:
        """One more step: its loss and its gradient's norm, which is not finite if it overflowed."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.newest.append((loss, norm))
        self.patches += patches

    def due(self, step: int) -> bool:
        """Whether a row follows step number `step`."""
        return step % self.every == 0 or step == self.last

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add the row of step number `step`: `numbers`, and means since the last row."""
        row = {
            "step": step,
            **_of_steps(self.losses, self.norms),
            **numbers,
            **self._measured(),
        }
        self.rows.append(row)
        self.losses, self.norms = [], []
        self._restart()
        self._show(row)

    def has(self, name: str) -> bool:
        """Whether a row has this number."""
        return any(name in row for row in self.rows)

    def amend(self, numbers: dict[str, float]) -> None:
        """Add `numbers` to the last row."""
        self.rows[-1] |= numbers
        self._show({"step": self.rows[-1]["step"], **numbers})

    def _measured(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        row = {
            "images_per_second": self.patches / seconds,
            "data_wait_share": self.waited / seconds,
        }
        if torch.cuda.is_available():
            row["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row

    def _restart(self) -> None:
        self.patches, self.waited, self.since = 0, 0.0, time.perf_counter()

    def _show(self, row: dict[str, float]) -> None:
        if not self.live:
            return
        self.live.step = row["step"]
        for name, value in row.items():
            if name != "step":
                self.live.log_metric(name, value)
        self.live.next_step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        lists = {"rows": self.rows, "losses": self.losses, "norms": self.norms}
        return {**lists, "newest": list(self.newest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state: nothing is missing from the curves, nothing is there twice."""
        self.rows, self.losses, self.norms = state["rows"], state["losses"], state["norms"]
        self.newest.clear()
        self.newest.extend(map(tuple, state["newest"]))
        for row in self.rows:
            self._show(row)
        self._restart()

    def summary(self) -> dict[str, float]:
        """The newest of each number but those measured; of loss and norm that of the last epoch.

        Nothing in it depends on where the rows are.
        """
        left_out = ("step", *MEASURED)
        newest = {name: value for row in self.rows for name, value in row.items()}
        row = {name: value for name, value in newest.items() if name not in left_out}
        losses, norms = zip(*self.newest, strict=True)
        return {**row, **_of_steps(losses, norms)}


def _of_steps(losses: Sequence[float], norms: Sequence[float]) -> dict[str, float]:
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "loss": sum(losses) / len(losses),
        "gradient_norm": sum(finite) / max(len(finite), 1),
        "skipped_steps": len(norms) - len(finite),
    }
