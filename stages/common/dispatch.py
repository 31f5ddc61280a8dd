"""Slides handed out to workers, and who is to blame when a worker process dies.

Each worker is given one task at a time, by its address. So a worker that dies, as seen by its
absence, tells which task it had; Dask itself gives workers more, and blames all that they held. A
slide whose worker died runs again with the others, as its machine may have been lost; if it dies
once more it runs alone, as neighbours may have taken the memory; what dies alone is to blame.
Tasks are slides, or groups of them; the slides of a group that fails run again one by one.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from stages.common import failures
from stages.common.failures import WorkerDied
from stages.common.workers import LOOK_SECONDS, Workers

logger = logging.getLogger(__name__)

DEATHS = 3  # of a slide's worker: among others, among others again, and alone
PAUSE_SECONDS = 10.0  # before what may pass is tried again

Task = tuple[Any, ...]  # of jobs (perslide.Job)
Build = Callable[..., None]


def each(
    workers: Workers, build: Build, tasks: list[Task], retries: int
) -> Iterator[tuple[Task, BaseException | None]]:
    """Run the tasks; yield each with its last error, None when it went well.

    Args:
        workers: Who works.
        build: Called in a worker with (task, device).
        tasks: Of one job or more.
        retries: Of a slide, after errors that may pass.

    Raises:
        OSError: the disk is full, or scheduler or workers are gone.
    """
    trial = _Trial(retries)
    crowd, alone = tasks, []
    while crowd or alone:
        trial.crowd, trial.alone, trial.pause = [], [], False
        for some, width in ((crowd, len(crowd)), (alone, 1)):
            for task, error in _hand_out(workers, build, some, width):
                if error is None or not trial.again(task, error):
                    yield task, error
        crowd, alone = trial.crowd, trial.alone
        if trial.pause:
            time.sleep(PAUSE_SECONDS)


class _Trial:
    """Who runs again, and how."""

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._deaths: Counter[str] = Counter()
        self._slips: Counter[str] = Counter()
        self.crowd: list[Task] = []
        self.alone: list[Task] = []
        self.pause = False

    def again(self, task: Task, error: BaseException) -> bool:
        """Whether the task is to run again, which is noted."""
        failures.check(error)
        name = task[0].slide_id
        if len(task) > 1:
            self.crowd += [(job,) for job in task]
        elif isinstance(error, WorkerDied) and self._deaths[name] < DEATHS - 1:
            self._deaths[name] += 1
            (self.alone if self._deaths[name] == DEATHS - 1 else self.crowd).append(task)
        elif failures.says(error, failures.PASSING) and self._slips[name] < self._retries:
            self._slips[name] += 1
            self.crowd.append(task)
            self.pause = True
        else:
            return False
        names = ", ".join(job.slide_id for job in task)
        logger.warning("%s: %s; tried again later", names, failures.explain(error))
        return True


def _hand_out(
    workers: Workers, build: Build, tasks: list[Task], width: int
) -> Iterator[tuple[Task, BaseException | None]]:
    """Run the tasks with at most `width` in flight, at most one on each worker."""
    waiting, changed = deque(tasks), threading.Event()
    running: dict[str, tuple[Task, Any]] = {}  # by the worker's address
    while waiting or running:
        for address in sorted(workers.fit(busy=bool(running)) - running.keys()):
            if waiting and len(running) < width:
                task = waiting.popleft()
                running[address] = task, _submit(workers, build, task, address, changed)
        changed.wait(LOOK_SECONDS)
        changed.clear()
        for address, (task, future) in list(running.items()):
            if future.done() or not workers.has(address):
                del running[address]
                error = workers.error(future)
                if isinstance(error, WorkerDied):
                    workers.lose(address)
                yield task, error


def _submit(
    workers: Workers, build: Build, task: Task, address: str, changed: threading.Event
) -> Any:
    # To this worker and no other: were the task moved, another would hold two.
    given = {"workers": [address], "pure": False, "retries": 0}
    future = workers.client.submit(build, task, workers.device(address), **given)
    future.add_done_callback(lambda _: changed.set())
    return future
