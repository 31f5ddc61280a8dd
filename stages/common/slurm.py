"""Workers as jobs of a SLURM cluster, by dask-jobqueue; `engine.scheduler: slurm`.

The scheduler runs here, in the stage. A job is one worker process, for one slide at a time; what
ends, as at its walltime, is asked for anew. Jobs need the repository, its environment and the cache
at the same paths as here: they begin in this folder, with this Python.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common import cache


@dataclass(frozen=True)
class SlurmParams:
    """The section `engine.slurm`: what sbatch is asked for, for each job."""

    jobs: int  # at most so many at once
    cores: int  # of a job; a slide keeps one busy, readers of patches for a GPU some more
    memory: str  # of a job, as 8GB; a process that takes more is killed, and its slide blamed
    walltime: str  # as 08:00:00
    partition: str  # empty: the cluster's own choice; so the account
    account: str
    interface: str  # of the network between here and the nodes, as ib0; empty: the default
    directives: tuple[str, ...]  # more options of sbatch, as --nice=100
    gpu_directives: tuple[str, ...]  # of jobs that use a GPU: one each
    prologue: tuple[str, ...]  # lines of shell before the worker starts, as module load

    def __post_init__(self) -> None:
        """Refuse jobs that could do nothing."""
        for name in ("jobs", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"params.yaml: engine.slurm.{name} is {getattr(self, name)}: it must be 1 or "
                    "more"
                )


def cluster(settings: SlurmParams, cuda: bool, environment: dict[str, str]) -> Any:
    """A `dask_jobqueue.SLURMCluster` without jobs yet.

    Args:
        settings: The section.
        cuda: Jobs use a GPU.
        environment: Variables of the workers.

    Raises:
        ImportError: dask-jobqueue is not installed.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise ImportError(
            'engine.scheduler is slurm, which needs dask-jobqueue: pip install ".[slurm]"'
        ) from None
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    here = f"cd {shlex.quote(str(Path.cwd()))}"  # from where workers import the stages
    return SLURMCluster(
        queue=settings.partition or None,
        account=settings.account or None,
        cores=1,  # threads, of the one process
        processes=1,
        job_cpu=settings.cores,
        memory=settings.memory,
        walltime=settings.walltime,
        interface=settings.interface or None,
        nanny=True,
        job_extra_directives=[*settings.directives, *(settings.gpu_directives if cuda else ())],
        job_script_prologue=[*exports, *settings.prologue, here],
        worker_extra_args=["--no-dashboard"],
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
        log_directory=str(cache.root().resolve() / "slurm"),
    )
