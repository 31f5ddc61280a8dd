"""The Dask cluster of the per-slide map: processes here, a scheduler by address, or SLURM jobs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from stages.common import params, slurm

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
ANSWER_SECONDS = 10  # for a scheduler by address
RETURN_SECONDS = 60  # a worker that died is started anew within a few
# Ctrl-C reaches workers too: they are closed by the stage, or each would print a traceback.
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
SLURM = "slurm"


@dataclass(frozen=True)
class EngineParams:
    """How the map runs. No result depends on it, so no stage tracks it."""

    workers: int  # processes on this machine; 0: one per core
    scheduler: str  # address of a running Dask scheduler; slurm: jobs of the section engine.slurm;
    # empty: processes on this machine
    retries: int = 1  # of a slide, after errors that may pass, as of a network's disk
    wait_minutes: float = 5.0  # without a worker, then the stage fails; for jobs that queue: more

    def __post_init__(self) -> None:
        """Refuse a count that would wait forever."""
        if self.workers < 0:
            raise ValueError(
                f"params.yaml: engine.workers is {self.workers}: it must be 0 (all cores) or more"
            )
        for name in ("retries", "wait_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"params.yaml: engine.{name} is {getattr(self, name)}: it must be 0 or more"
                )


@contextmanager
def connect(engine: EngineParams, job_count: int, cuda: bool = False) -> Iterator[Any]:
    """A client of the cluster that `engine` names, for the time of the block.

    Args:
        engine: How the map runs.
        job_count: No more workers than that are started.
        cuda: Workers are to have a GPU each.

    Raises:
        ImportError: the cluster is SLURM's, and dask-jobqueue is not installed.
        ValueError: the scheduler does not answer.
    """
    import dask

    # Before distributed is imported, which sets its loggers up once: failures are ours to tell.
    dask.config.set({"logging.distributed": "critical"})
    from distributed import Client

    if engine.scheduler == SLURM:
        settings = params.load(slurm.SlurmParams, "engine.slurm")
        with (
            slurm.cluster(settings, cuda, WORKER_ENVIRONMENT) as cluster,
            Client(cluster) as client,
        ):
            cluster.scale(jobs=min(settings.jobs, job_count))
            yield client
    elif engine.scheduler:
        with _connected(Client, engine.scheduler) as client:
            yield client
    else:
        with _local(engine, job_count) as cluster, Client(cluster) as client:
            yield client
            # Dask breaks off with an error when it closes a worker that is just coming back. All
            # work is done: one that does not come back is none's loss.
            with suppress(TimeoutError):
                client.wait_for_workers(len(cluster.workers), timeout=RETURN_SECONDS)


def _local(engine: EngineParams, job_count: int) -> Any:
    import dask
    from distributed import LocalCluster

    workers = min(engine.workers or len(os.sched_getaffinity(0)), job_count)
    settings = {
        "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
        "distributed.worker.preload": [*dask.config.get("distributed.worker.preload"), DEAF],
    }
    with dask.config.set(settings):
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        )


def _connected(client: Callable[..., Any], address: str) -> Any:
    try:
        return client(address, timeout=ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"params.yaml: engine.scheduler is {address!r} and does not answer ({error}): "
            "start it, or leave the key empty for this machine"
        ) from None
