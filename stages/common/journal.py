"""The curves of a run: rows of numbers that checkpoints keep and DVCLive shows."""

import time
from pathlib import Path
from typing import Any

from dvclive import Live

SPEED = "images_per_second"


class Journal:
    """A row every so many steps; after a resume the folder shows the rows before it as well.

    Args:
        folder: For DVCLive, which empties it.
        every: Steps between two rows.
        last: Number of the last step, which has a row in any case.
    """

    def __init__(self, folder: Path, every: int, last: int) -> None:
        self.live = Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False)
        self.every, self.last = every, last
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last row
        self.patches, self.since = 0, time.perf_counter()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.live.end()

    def note(self, loss: float, patches: int) -> None:
        """One more step was taken."""
        self.losses.append(loss)
        self.patches += patches

    def due(self, step: int) -> bool:
        """Whether a row follows step number `step`."""
        return step % self.every == 0 or step == self.last

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add the row of step number `step`: mean loss and speed since the last row, `numbers`."""
        now = time.perf_counter()
        row = {
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            **numbers,
            SPEED: self.patches / (now - self.since),
        }
        self.rows.append(row)
        self.losses, self.patches, self.since = [], 0, now
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        self.live.step = row["step"]
        for name, value in row.items():
            if name != "step":
                self.live.log_metric(name, value)
        self.live.next_step()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": self.rows, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state: nothing is missing from the curves, nothing is there twice."""
        self.rows, self.losses = state["rows"], state["losses"]
        for row in self.rows:
            self._show(row)
        self.patches, self.since = 0, time.perf_counter()

    def summary(self, steps: int) -> dict[str, float]:
        """The last row, with the mean loss of the rows of the last `steps` steps, without speed."""
        first = self.last - steps
        losses = [row["loss"] for row in self.rows if row["step"] > first]
        row = {name: value for name, value in self.rows[-1].items() if name not in ("step", SPEED)}
        return {**row, "loss": sum(losses) / len(losses)}
