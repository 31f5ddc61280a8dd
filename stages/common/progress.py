"""How far a stage is, in one line: slides, their rate and that of what they hold, failures, time.

tile:  45%|█████████           | 18/40 slides, 1.5 slides/s, 150 patches/s, 1 failed [00:12<00:15]
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

FORM = "{desc}: {percentage:3.0f}%|{bar:20}| {unit} [{elapsed}<{remaining}]"


class Progress:
    """The bar, to be used as a context.

    Args:
        stage: Name of the bar.
        jobs: With `work`, each one's share of the bar (perslide.Job).
        noun: What a job is.
        unit: What is counted besides; empty: nothing.
        count: How many units a finished folder holds; None: the job's work.
    """

    def __init__(
        self,
        stage: str,
        jobs: Sequence[Any],
        noun: str,
        unit: str,
        count: Callable[[Path], int] | None,
    ) -> None:
        self.stage = stage
        self._jobs, self._noun, self._unit, self._count = jobs, noun, unit, count
        self._made = self._failed = self._units = 0

    def __enter__(self) -> "Progress":
        """Begin to measure time."""
        total = sum(job.work for job in self._jobs)
        # The mean speed: slides end in bursts, one from each process.
        about = {"desc": self.stage, "unit": f"0/{len(self._jobs)} {self._noun}s"}
        self._bar = tqdm(total=total, bar_format=FORM, smoothing=0, **about)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._bar.refresh()
        self._bar.close()

    def add(self, work: int, folder: Path, failed: bool) -> None:
        """One job more is through, with this share of the bar; its result is in `folder`."""
        self._made += not failed
        self._failed += failed
        if self._unit and not failed:
            self._units += self._count(folder) if self._count else work
        self._show()
        self._bar.update(work)

    def summary(self) -> str:
        """What was made, in what time, at which rates."""
        seconds = self._bar.format_dict["elapsed"]
        return f"made {self._made} {self._noun}s in {seconds:.1f} s, {self._rates()}"

    def _rates(self) -> str:
        seconds = max(self._bar.format_dict["elapsed"], 1e-3)
        rates = f"{self._made / seconds:.3g} {self._noun}s/s"
        return f"{rates}, {self._units / seconds:.3g} {self._unit}/s" if self._unit else rates

    def _show(self) -> None:
        done = f"{self._made + self._failed}/{len(self._jobs)} {self._noun}s"
        failed = f", {self._failed} failed" if self._failed else ""
        self._bar.unit = f"{done}, {self._rates()}{failed}"
