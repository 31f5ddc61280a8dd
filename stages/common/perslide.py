"""The per-slide map: what is in the cache is linked, what is not is made, on all cores.

Slides are mapped on Dask distributed, a local cluster of single-threaded processes by default, or
the scheduler named in params.yaml (`engine.scheduler`). A slide that fails stops no other: what
was made is kept, the failures are listed at the end, and the stage exits non-zero. A slide that
kills its worker is found by running the suspects alone (stages/common/cluster.py).
"""

import functools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.common import cache, cluster, devices, disk, fingerprint, params

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One slide's work."""

    slide_id: str
    inputs: tuple[str, ...]  # content digests of what the result is made from
    arguments: dict[str, Any] = field(default_factory=dict)  # for `make`; not part of the key
    work: int = 1  # share of the progress bar, in the unit of `run`


Make = Callable[[Path, Job], None]


def run(
    stage: str,
    make: Make,
    jobs: list[Job],
    target: Path,
    *,
    code: tuple[str, ...],
    settings: dict[str, Any],
    processes: int | None = None,
    unit: str = "",
    noun: str = "slide",
    needs: Callable[[list[Job]], disk.Needs] | None = None,
) -> None:
    """Bring every job's result to `target/<slide_id>/`, making only what the cache lacks.

    Args:
        stage: Names the stage in the cache and the log.
        make: Fills a folder with one slide's files. A top-level function: it runs in workers. Equal
            job, settings and code must give equal bytes.
        jobs: One a slide.
        target: Holds hard links to the cache, and nothing else afterwards.
        code: Modules that decide the bytes; all they import counts too.
        settings: Every param that decides the bytes.
        processes: At most so many at once on this machine, as for one a GPU; None: one a core.
        unit: What `Job.work` counts; the progress bar tells how many a second. Empty: `noun`.
        noun: What a job is.
        needs: What the results of some jobs take on the disk; asked of those that are missing.

    Raises:
        OSError: the disk has less room than they need.
        ValueError: slides failed; all others are in the cache, and a rerun makes only those.
    """
    engine = params.load(cluster.EngineParams, "engine")
    if processes:
        engine = replace(engine, workers=min(engine.workers or processes, processes))
    cache.sweep(stage)
    digest = fingerprint.code_digest(code)
    keys = {
        job.slide_id: cache.key_of(stage, job.slide_id, job.inputs, settings, digest)
        for job in jobs
    }
    missing = [job for job in jobs if not cache.entry(stage, keys[job.slide_id]).is_dir()]
    reused = len(jobs) - len(missing)
    logger.info("%s: %d %ss to make, %d reused", stage, len(missing), noun, reused)
    if missing and needs:
        disk.check(stage, needs(missing), target)
    if missing and target.exists():  # a run that fails must not leave a stage that looks whole
        shutil.rmtree(target)
    made = {"settings": settings, "code": digest}
    build = functools.partial(_build, stage, make, provenance=made)
    failures = _build_all(stage, build, missing, keys, engine, (noun, unit)) if missing else {}
    cache.sweep(stage)
    _report(stage, failures, len(jobs), noun)
    cache.arrange({name: cache.entry(stage, key) for name, key in keys.items()}, target)


def _build_all(
    stage: str,
    build: Callable[..., None],
    jobs: list[Job],
    keys: dict[str, str],
    engine: cluster.EngineParams,
    words: tuple[str, str],
) -> dict[str, str]:
    """Make every job's result and return the error of each that failed."""
    noun, unit = words
    failures: dict[str, str] = {}
    begun = time.perf_counter()
    total = sum(job.work for job in jobs)
    with (
        cluster.connect(engine, len(jobs)) as client,
        # The mean speed: slides end in bursts, one from each process.
        tqdm(total=total, desc=stage, unit=f" {unit or noun}", smoothing=0) as bar,
    ):
        for job, error in cluster.each(client, build, jobs, keys):
            if error:
                failures[job.slide_id] = error
                tqdm.write(f"{stage}: {noun} {job.slide_id} failed: {error}")
            bar.update(job.work)
    made = len(jobs) - len(failures)
    logger.info("%s: made %d %ss in %.1f s", stage, made, noun, time.perf_counter() - begun)
    return failures


def _build(stage: str, make: Make, job: Job, key: str, provenance: dict[str, Any]) -> None:
    if cache.entry(stage, key).is_dir():  # made by a worker that died before it could tell
        return
    os.environ[devices.WORKER] = _worker_number()
    described = {**provenance, "inputs": job.inputs}
    cache.build(stage, key, job.slide_id, described, lambda folder: make(folder, job))


def _worker_number() -> str:
    """The digits that end this worker's name: workers of one machine are numbered from 0."""
    from distributed import get_worker

    digits = re.search(r"\d+$", str(get_worker().name))
    return digits[0] if digits else "0"


def _report(stage: str, failures: dict[str, str], total: int, noun: str) -> None:
    if failures:
        listed = "".join(f"\n  {slide_id}: {why}" for slide_id, why in sorted(failures.items()))
        raise ValueError(
            f"{stage}: {len(failures)} of {total} {noun}s failed; the others are kept. Mend these "
            f"or leave their slides out of the cohort, and run again:{listed}"
        )
