"""The Dask cluster of the per-slide map, and who is to blame when a worker process dies.

A worker holds two slides at a time, and Dask cannot tell which of them killed it. So both become
suspects, and each suspect runs again with nothing else in flight: what dies alone is to blame.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stages.common import cache

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "DASK_LOGGING__DISTRIBUTED": "critical",
    # One process is one slide: libraries that start threads of their own would fight for cores.
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "OPENCV_FOR_THREADS_NUM": "1",
    # Dask has workers return freed memory at once; arrays of megabytes then cost page faults, and
    # the time of a stage doubles.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
}
WINDOW = 2  # tasks in flight per worker: enough to keep it busy, few enough to lose little
RETURN_SECONDS = 60  # a worker that died is started anew within a few
TRIES_ALONE = 2  # a suspect's worker may also die by another's hand, as by a machine that is lost


@dataclass(frozen=True)
class EngineParams:
    """How the map runs. No result depends on it, so no stage tracks it."""

    workers: int  # processes on this machine; 0: one per core
    scheduler: str  # address of a running Dask scheduler; empty: a cluster on this machine

    def __post_init__(self) -> None:
        """Refuse a count that would wait forever."""
        if self.workers < 0:
            raise ValueError(
                f"params.yaml: engine.workers is {self.workers}: it must be 0 (all cores) or more"
            )


def each(
    client: Any, build: Callable[..., None], jobs: list[Any], keys: dict[str, str]
) -> Iterator[tuple[Any, str]]:
    """Run the jobs, suspects again alone; yield each once, with its error or an empty string."""
    suspects = []
    width = WINDOW * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    for job, error in _window(client, build, jobs, keys, width):
        if _killed(error):
            suspects.append(job)
        else:
            yield job, _explain(error)
    if suspects:
        names = ", ".join(sorted(job.slide_id for job in suspects))
        logger.info("workers died while they held %s: each runs again, alone", names)
    for job in suspects:
        yield job, _explain(_alone(client, build, job, keys))


def _alone(
    client: Any, build: Callable[..., None], job: Any, keys: dict[str, str]
) -> BaseException | None:
    error = None
    for _ in range(TRIES_ALONE):
        ((_, error),) = _window(client, build, [job], keys, 1)
        if not _killed(error):
            break
    return error


def _window(
    client: Any, build: Callable[..., None], jobs: list[Any], keys: dict[str, str], width: int
) -> Iterator[tuple[Any, BaseException | None]]:
    """Run the jobs with `width` in flight; yield each with its error, None when it went well."""
    from distributed import as_completed

    waiting = iter(jobs)
    running: dict[str, Any] = {}

    def submit() -> Any:
        job = next(waiting, None)
        if job is None:
            return None
        future = client.submit(build, job, keys[job.slide_id], pure=False, retries=0)
        running[future.key] = job
        return future

    finished = as_completed([future for _ in range(width) if (future := submit())])
    for future in finished:
        job = running.pop(future.key)
        error = future.exception() if future.status == "error" else None
        future.release()
        following = submit()
        if following:
            finished.add(following)
        yield job, error


def _killed(error: BaseException | None) -> bool:
    from distributed.scheduler import KilledWorker

    return isinstance(error, KilledWorker)


def _explain(error: BaseException | None) -> str:
    if error is None:
        return ""
    if _killed(error):
        return "its worker process died, for want of memory or by a crash of the slide's reader"
    if isinstance(error, OSError) and error.errno == 28:
        return f"no space left on the disk of {cache.root()}: free some or set CYTOSSL_CACHE"
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + str(error)


def _suspect_at_once(dask_scheduler: Any) -> None:
    """What a scheduler of its own is told by its settings: a death is ours to judge."""
    dask_scheduler.allowed_failures = 0


@contextmanager
def connect(engine: EngineParams, job_count: int) -> Iterator[Any]:
    """A client of the cluster that `engine` names, for the time of the block.

    Raises:
        ValueError: the scheduler does not answer.
    """
    import dask

    # Before distributed is imported, which sets its loggers up once: failures are ours to tell.
    dask.config.set({"logging.distributed": "critical"})
    from distributed import Client, LocalCluster

    if engine.scheduler:
        with _connected(Client, engine.scheduler) as client:
            client.run_on_scheduler(_suspect_at_once)
            yield client
        return
    workers = min(engine.workers or len(os.sched_getaffinity(0)), job_count)
    with dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
            "distributed.scheduler.allowed-failures": 0,
        }
    ):
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        )
        with cluster, Client(cluster) as client:
            yield client
            # Dask breaks off with an error when it closes a worker that is just coming back.
            client.wait_for_workers(workers, timeout=RETURN_SECONDS)


def _connected(client: Callable[[str], Any], address: str) -> Any:
    try:
        return client(address)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"params.yaml: engine.scheduler is {address!r} and does not answer ({error}): "
            "start it, or leave the key empty for this machine"
        ) from None
