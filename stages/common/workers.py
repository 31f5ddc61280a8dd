"""The worker processes of a cluster: which are there, and which may be given a slide."""

import logging
import time
from typing import Any

from stages.common import devices, fingerprint
from stages.common.cluster import SLURM, EngineParams
from stages.common.failures import WorkerDied

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks


class Workers:
    """Looked at again and again while slides are handed out.

    Args:
        client: Of the cluster.
        engine: How the map runs.
        cuda: Only a worker that holds a GPU of its own is given slides.

    Raises:
        ValueError: the scheduler runs other code.
    """

    def __init__(self, client: Any, engine: EngineParams, cuda: bool) -> None:
        self.client, self._engine, self._cuda = client, engine, cuda
        self._device: dict[str, str] = {}  # of each worker that was greeted, by address
        self._running: set[str] = set()
        self._next_look = 0.0
        self._last_seen = time.monotonic()
        if engine.scheduler not in ("", SLURM):
            self._greet_scheduler()

    def fit(self, busy: bool) -> set[str]:
        """Addresses of the workers that may be given slides.

        Args:
            busy: Slides are in flight; else somebody must be there.

        Raises:
            ConnectionError: the scheduler is gone, or all workers are.
            ValueError: a worker is not fit.
        """
        if time.monotonic() < self._next_look:
            return self._running
        found = self._ask()
        if self._engine.scheduler == SLURM:  # jobs that ended, as at their walltime, begin anew
            self.client.cluster.scale(len(self.client.cluster.worker_spec))
        self._device = {name: had for name, had in self._device.items() if name in found}
        self._greet({name: found[name] for name in found if name not in self._device})
        self._running = {
            name
            for name, device in self._device.items()
            if found[name]["status"] == "running" and (device or not self._cuda)
        }
        if busy or self._running:
            self._last_seen = time.monotonic()
        self._check_absence()
        self._next_look = time.monotonic() + LOOK_SECONDS
        return self._running

    def has(self, address: str) -> bool:
        """Whether this worker was there at the last look, running or not."""
        return address in self._device

    def lose(self, address: str) -> None:
        """Take note that this worker died."""
        self._device.pop(address, None)
        self._running.discard(address)

    def device(self, address: str) -> str:
        """The GPU that the worker holds; "cpu" where none was asked for."""
        return self._device[address] if self._cuda else "cpu"

    def error(self, future: Any) -> BaseException | None:
        """Why this task failed, None when it went well; one that is not done died with its worker.

        Raises:
            ConnectionError: the scheduler is gone.
        """
        from distributed.scheduler import KilledWorker

        if future.status == "cancelled":
            raise self._lost_scheduler()
        if future.status == "finished":
            return None
        error = future.exception() if future.status == "error" else WorkerDied()
        return WorkerDied() if isinstance(error, KilledWorker) else error

    def _ask(self) -> dict[str, Any]:
        try:
            if self.client.status == "running":
                return self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]
        except OSError:
            pass  # the same as a client that has noticed already
        raise self._lost_scheduler()

    def _greet_scheduler(self) -> None:
        try:
            answer = self.client.run_on_scheduler(greeting, False)
        except ImportError as error:
            answer = error
        _check_code(f"the scheduler {self._engine.scheduler}", answer)

    def _greet(self, new: dict[str, Any]) -> None:
        """Look at workers that were not here before; those that answer become known."""
        if not self._engine.scheduler and not self._cuda:  # our own processes, and nothing to ask
            self._device |= dict.fromkeys(new, "")
            return
        if not new:
            return
        answers = self.client.run(greeting, self._cuda, workers=list(new), on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, OSError):  # it died meanwhile, or is not up yet
                continue
            who = f"the worker {new[address]['name']} at {address}"
            _check_code(who, answer)
            _check_threads(who, new[address]["nthreads"])
            self._device[address] = answer[1]

    def _lost_scheduler(self) -> ConnectionError:
        return ConnectionError(
            f"the scheduler {self._engine.scheduler or 'on this machine'} is gone: start it again, "
            "and run again; finished slides are kept"
        )

    def _check_absence(self) -> None:
        if time.monotonic() - self._last_seen > 60 * self._engine.wait_minutes:
            what = (
                "no worker has a GPU of its own"
                if self._cuda and self._device
                else "no worker is left"
            )
            where = self._engine.scheduler or "this machine"
            raise ConnectionError(
                f"{what} on {where} since {self._engine.wait_minutes:g} minutes "
                "(engine.wait_minutes): start workers, with a nanny or they do not come back when "
                "a slide kills them, and run again; finished slides are kept"
            )


def greeting(cuda: bool) -> tuple[str, str]:
    """There: the digest of the code that runs, and the GPU that the process holds."""
    return fingerprint.loaded(), devices.hold() if cuda else ""


def _check_code(who: str, answer: Any) -> None:
    if isinstance(answer, Exception):
        raise ValueError(
            f"{who} cannot run this repository's code ({answer}): start scheduler and workers in "
            "the repository, with its environment: `PYTHONPATH=. dask scheduler`, and so `dask "
            "worker`"
        )
    if answer[0] != fingerprint.loaded():
        raise ValueError(f"{who} runs other code than lies here: restart it in this repository")


def _check_threads(who: str, threads: int) -> None:
    if threads != 1:
        raise ValueError(
            f"{who} has {threads} threads: a process is given one slide at a time, start it with "
            f"--nthreads 1 --nworkers {threads}"
        )
