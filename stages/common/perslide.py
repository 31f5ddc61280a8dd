"""The per-slide map: what is in the cache is linked, what is not is made, on all cores.

Slides are mapped on Dask distributed (stages/common/cluster.py), each as one task of one worker
process (stages/common/dispatch.py). A slide that fails, or kills its worker, stops no other: what
was made is kept, the failures are listed at the end, and the stage exits non-zero or, with
`on_error: quarantine`, goes on without them and lists them in failed.csv. They are tried again
whenever the stage runs, as nothing of them is in the cache. A slide whose file vanished is no bad
slide, and would be lost for good, as DVC runs no stage again that went well: once all others are
made the stage exits non-zero, quarantine or not.
"""

import functools
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.common import (
    cache,
    cluster,
    devices,
    disk,
    dispatch,
    failures,
    fingerprint,
    params,
    results,
)
from stages.common.progress import Progress
from stages.common.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One slide's work."""

    slide_id: str
    inputs: tuple[str, ...]  # content digests of what the result is made from
    arguments: dict[str, Any] = field(default_factory=dict)  # for `make`; not part of the key
    work: int = 1  # share of the progress bar, in the unit of `run`


Task = tuple[Job, ...]
Make = Callable[[Path, Job], None]
MakeMany = Callable[[list[Path], list[Job]], None]


@dataclass(frozen=True)
class _Recipe:
    """What a worker must know to make results."""

    stage: str
    make: Make | MakeMany
    many: bool
    keys: dict[str, str]
    provenance: dict[str, Any]
    places: dict[str, str]  # of cache and repository, as environment: workers may begin elsewhere

    def entry(self, job: Job) -> Path:
        return cache.entry(self.stage, self.keys[job.slide_id])


def run(
    stage: str,
    make: Make | MakeMany,
    jobs: list[Job],
    target: Path,
    *,
    code: tuple[str, ...],
    settings: dict[str, Any],
    on_error: str = "",
    device: str = "",
    together: int = 0,
    unit: str = "",
    count: Callable[[Path], int] | None = None,
    noun: str = "slide",
    needs: Callable[[list[Job]], disk.Needs] | None = None,
) -> list[str]:
    """Bring every job's result to `target/<slide_id>/`, making only what the cache lacks.

    Args:
        stage: Names the stage in the cache and the log.
        make: Fills a folder with one slide's files. A top-level function: it runs in workers. Equal
            job, settings and code must give equal bytes. With `together` it is given lists of
            folders and of jobs; no slide's bytes may depend on what else is in the lists.
        jobs: One a slide.
        target: Holds hard links to the cache, and nothing else afterwards but failed.csv and
            results.csv.
        code: Modules that decide the bytes; all they import counts too.
        settings: Every param that decides the bytes.
        on_error: Of `failures.FailureParams`; empty: stop, and neither list is written.
        device: "cuda": each worker has a GPU of its own, and those without one are not used; "cpu":
            none uses one; empty: no matter.
        together: Most jobs given to `make` at once; 0: one, and not in a list.
        unit: What `Job.work` or `count` counts; the progress bar tells how many a second.
        count: How many units a finished folder holds, where that is known no sooner.
        noun: What a job is.
        needs: What the results of some jobs take on the disk; asked of those that are missing.

    Returns:
        The ids of the slides that are in `target`, in the order of the jobs.

    Raises:
        OSError: the disk is full or has less room than is needed, or the cluster is gone; what was
            made is kept.
        FileNotFoundError: slides vanished, whatever `on_error` is; what was made is kept.
        ValueError: slides failed; what was made is kept, and a rerun makes only the others.
    """
    cache.sweep(stage)
    digest = fingerprint.code_digest(code)
    keys = {
        job.slide_id: cache.key_of(stage, job.slide_id, job.inputs, settings, digest)
        for job in jobs
    }
    places = {"CYTOSSL_CACHE": cache.root(), "DVC_ROOT": cache.repository()}
    resolved = {name: str(path.resolve()) for name, path in places.items()}
    made = {"settings": settings, "code": digest}
    recipe = _Recipe(stage, make, together > 0, keys, made, resolved)
    missing = [job for job in jobs if not recipe.entry(job).is_dir()]
    reused = len(jobs) - len(missing)
    logger.info("%s: %d %ss to make, %d reused", stage, len(missing), noun, reused)
    if missing and needs:
        disk.check(stage, needs(missing), target)
    if missing and target.exists():  # a run that fails must not leave a stage that looks whole
        shutil.rmtree(target)
    bar = Progress(stage, missing, noun, unit, count)
    errors = _build_all(recipe, missing, device, together, bar) if missing else {}
    _report(stage, errors, len(jobs), noun, on_error)
    failed = {slide_id: failures.explain(error) for slide_id, error in errors.items()}
    good = [job.slide_id for job in jobs if job.slide_id not in failed]
    cache.arrange({name: cache.entry(stage, keys[name]) for name in good}, target)
    if on_error:
        failures.write(target, failed)
        results.write(target, {name: keys[name] for name in good})
    return good


def _build_all(
    recipe: _Recipe, jobs: list[Job], device: str, together: int, bar: Progress
) -> dict[str, BaseException]:
    """Make every job's result and return the error of each that failed."""
    engine, cuda = params.load(cluster.EngineParams, "engine"), device == "cuda"
    if cuda and not engine.scheduler:
        here = max(devices.count(), 1)
        engine = replace(engine, workers=min(engine.workers or here, here))
    build = functools.partial(_build, recipe, device)
    step = max(together, 1)
    tasks = [tuple(jobs[at : at + step]) for at in range(0, len(jobs), step)]
    failed: dict[str, BaseException] = {}
    try:
        with cluster.connect(engine, len(tasks), cuda) as client, bar:
            workers = Workers(client, engine, cuda)
            for task, error in dispatch.each(workers, build, tasks, engine.retries):
                for job in task:
                    if error:
                        failed[job.slide_id] = error
                        why = failures.explain(error)
                        tqdm.write(f"{bar.stage}: {job.slide_id} failed: {why}")
                    bar.add(job.work, recipe.entry(job), bool(error))
    finally:
        cache.sweep(recipe.stage)
    logger.info("%s: %s", recipe.stage, bar.summary())
    return failed


def _build(recipe: _Recipe, device: str, task: Task, own: str) -> None:
    """In a worker: make what is not there yet; `own` is the GPU that this process holds, or cpu."""
    told = {devices.DEVICE: own if device else "", devices.WORKER: _worker_number()}
    os.environ.update(recipe.places | told)
    # What is there was made by a worker that died before it could tell.
    _fill(recipe, [job for job in task if not recipe.entry(job).is_dir()], [])


def _fill(recipe: _Recipe, jobs: list[Job], folders: list[Path]) -> None:
    """Open a folder for each job, one within the other, and have all of them filled."""
    if len(folders) < len(jobs):
        job = jobs[len(folders)]
        described = {**recipe.provenance, "inputs": job.inputs}
        key, inner = recipe.keys[job.slide_id], functools.partial(_fill, recipe, jobs)
        cache.build(
            recipe.stage, key, job.slide_id, described, lambda folder: inner([*folders, folder])
        )
    elif recipe.many and jobs:
        recipe.make(folders, jobs)
    elif jobs:
        recipe.make(folders[0], jobs[0])


def _worker_number() -> str:
    """The digits that end this worker's name: workers of one machine are numbered from 0."""
    from distributed import get_worker

    digits = re.search(r"\d+$", str(get_worker().name))
    return digits[0] if digits else "0"


def _report(
    stage: str, failed: dict[str, BaseException], total: int, noun: str, on_error: str
) -> None:
    if not failed:
        return
    told = {name: failures.explain(error) for name, error in failed.items()}
    listed = "".join(f"\n  {slide_id}: {why}" for slide_id, why in sorted(told.items()))
    count = f"{stage}: {len(failed)} of {total} {noun}s"
    if on_error == "quarantine":
        gone = sum(isinstance(error, FileNotFoundError) for error in failed.values())
        if gone:
            raise FileNotFoundError(
                f"{stage}: {gone} of {total} {noun}s vanished: run again when they are back; what "
                f"was made is kept:{listed}"
            )
        if len(failed) < total:
            logger.warning("%s quarantined:%s", count, listed)
            return
    raise ValueError(
        f"{count} failed; the others are kept. Mend these or leave their slides out of the cohort, "
        f"and run again; on_error: quarantine goes on without them:{listed}"
    )
