"""What MIL heads cost: an epoch of each, folds and seeds side by side, the full grid, a huge bag.

Run `OMP_NUM_THREADS=1 python -m benchmarks.mil`, or one part of it: `--part epoch`, `processes`,
`grid` or `large`. Bags are drawn numbers, 200 of 100 x 192 unless a part says otherwise; `--tiny`
tries everything on a few. An epoch is forward, backward and step of every bag, in CPU seconds of
one thread: the difference between fits of three epochs and of one, halved, so that making a head
does not count. Fits take turns, a figure is the median over the turns. Slow heads see fewer bags
and are scaled up, which is said beside them. `epoch` and `large` take sizes from
profiles/paper.yaml, those of the official codes; `grid` and `processes` from params.yaml.

`PUBLISHED` are the official loops' CPU seconds on this kind of machine (2 shared cores, one
thread, torch 2.15), measured once from their repositories, which are not part of this one.
"""

import argparse
import dataclasses
import logging
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.common import params, plugins

HEADS = ("abmil", "clam_sb", "dsmil", "dtfd_mil", "transmil", "less")
QUICK, OFFICIAL = Path("params.yaml"), Path("profiles/paper.yaml")
FOLDS, SEEDS, WORKERS, TURNS, BATCH = 5, 5, 2, 3, 32
PUBLISHED = {
    "abmil": "AMLab's loop 1.56; CLAM's gated net 1.16",
    "clam_sb": "CLAM's loop 1.45 (svm), 1.34 (ce)",
    "dsmil": "0.37",
    "dtfd_mil": "1.58 (MaxMinS, 4 groups)",
    "transmil": "137",
    "less": "about 300, from 3 slides",
}
log = logging.getLogger("benchmarks.mil")


@dataclasses.dataclass(frozen=True)
class Bags:
    """How many bags of what size."""

    bags: int = 200
    instances: int = 100
    dim: int = 192  # of one scale

    def drawn(self, scales: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
        """Bags and labels; an instance of class 1 stands out in a fifth of its numbers."""
        rng = np.random.default_rng(seed)
        labels = np.arange(self.bags) % 2
        bags = []
        for label in labels:
            bag = rng.standard_normal((self.instances, scales * self.dim), dtype=np.float32)
            bag[rng.integers(self.instances), ::5] += 2 * label
            bags.append(bag)
        return bags, labels

    def some(self, share: float) -> "Bags":
        """A share of the bags, two at least."""
        return dataclasses.replace(self, bags=max(2, round(self.bags * share)))


@dataclasses.dataclass(frozen=True)
class Contender:
    """A head as one row of the table trains it."""

    head: str
    note: str
    batch: int
    share: float  # of the bags; the rest is extrapolated
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its section


CONTENDERS = [
    *[Contender(head, "batched", BATCH, 1.0) for head in HEADS[:4]],
    *[Contender(head, "batch 1", 1, 1.0) for head in HEADS[:4]],
    Contender("transmil", "exact, batched", BATCH, 0.32, {"attention": "exact"}),
    Contender("transmil", "exact, batch 1", 1, 0.16, {"attention": "exact"}),
    Contender("transmil", "official Nystrom", 1, 0.02, {"attention": "nystrom"}),
    Contender("less", "batched", 8, 0.04),
    Contender("less", "batch 1", 1, 0.02),
]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    parts = {"epoch": epoch, "processes": processes, "grid": grid, "large": large}
    parser = argparse.ArgumentParser(description="Measure MIL heads.")
    parser.add_argument("--part", choices=parts)
    parser.add_argument("--head", choices=HEADS, help="only this head")
    parser.add_argument("--tiny", action="store_true", help="try it on a few small bags")
    chosen = parser.parse_args()
    size = Bags(10, 7, 16) if chosen.tiny else Bags()
    heads = (chosen.head,) if chosen.head else HEADS
    for name in [chosen.part] if chosen.part else parts:
        log.info("\n%s: %d bags of %d x %d", name, size.bags, size.instances, size.dim)
        parts[name](size, heads)


def epoch(size: Bags, heads: tuple[str, ...]) -> None:
    """CPU seconds of an epoch, batched and bag by bag; exact attention and Nystrom's."""
    rows = [one for one in CONTENDERS if one.head in heads]
    seconds: list[list[float]] = [[] for _ in rows]
    for turn in range(TURNS + 1):
        for found, contender in zip(seconds, rows, strict=True):
            taken = epoch_of(contender, size)
            if turn:  # the first turn warms up
                found.append(taken)
    log.info("head       how               bags seen  CPU s/epoch  ms a bag  official loop, CPU s")
    for found, one in zip(seconds, rows, strict=True):
        median, seen = statistics.median(found), size.some(one.share).bags
        log.info(
            "%-10s %-17s %9d %12.2f %9.2f  %s",
            one.head, one.note, seen, median, 1e3 * median / size.bags, PUBLISHED[one.head],
        )  # fmt: skip
    for head in heads:
        own = [statistics.median(f) for f, o in zip(seconds, rows, strict=True) if o.head == head]
        others = ", ".join(f"{value / own[0]:.1f}" for value in own[1:])
        log.info("%s: the others' time over the first's: %s", head, others)


def epoch_of(contender: Contender, size: Bags) -> float:
    head, settings = contender.head, settings_of(contender.head, OFFICIAL)
    settings = dataclasses.replace(settings, **contender.changes)
    some = size.some(contender.share)
    bags = some.drawn(scales_of(head))
    few = bags[0][:2], bags[1][:2]

    def seconds(epochs: int) -> float:
        start = time.process_time()
        made(head, size, trained(settings, epochs, contender.batch)).fit(*bags, *few, seed=0)
        return time.process_time() - start

    return (seconds(3) - seconds(1)) / 2 * size.bags / some.bags


def processes(size: Bags, heads: tuple[str, ...]) -> None:
    """Wall time of folds x seeds in one process and in two, each of one thread."""
    walls = [all_fits(heads[0], size, workers)[0] for workers in (1, WORKERS)]
    log.info("%s, %d folds x %d seeds: %.1f s in 1 process", heads[0], FOLDS, SEEDS, walls[0])
    log.info("%.1f s in %d: %.2f x faster", walls[1], WORKERS, walls[0] / walls[1])


def grid(size: Bags, heads: tuple[str, ...]) -> None:
    """Wall time of every head x fold x seed on all bags, a head after the other."""
    total = 0.0
    for head in heads:
        wall, cpu = all_fits(head, size, WORKERS)
        total += wall
        log.info("%-10s %7.1f s wall, %7.1f CPU s", head, wall, cpu)
    log.info("all        %7.1f s wall in %d processes; goal: 900", total, WORKERS)


def large(size: Bags, heads: tuple[str, ...]) -> None:
    """One step on one bag of 50,000 x 1536, each head in a process of its own."""
    huge = Bags(1, 50 * size.instances * 10, 8 * size.dim)
    log.info("one bag of %d x %d", huge.instances, huge.dim)
    log.info("head            s a step   peak MiB above the bag")
    for head in heads:
        with pool(1) as one:
            seconds, peak = one.submit(step_of, head, huge).result()
        log.info("%-10s %13.1f %10.0f", head, seconds, peak)


def step_of(head: str, huge: Bags) -> tuple[float, float]:
    """CPU seconds and memory of an epoch that is one bag, and one of two instances."""
    settings = trained(settings_of(head, QUICK if head == "less" else OFFICIAL), 1, 1)
    (bag,), _ = huge.drawn(scales_of(head))
    bags, labels = [bag, bag[:2].copy()], np.array([0, 1])
    before, start = peak_mib(), time.process_time()
    few = [bags[1], bags[1]]
    made(head, huge, settings).fit(bags, labels, few, labels, seed=0)
    return time.process_time() - start, peak_mib() - before


def all_fits(head: str, size: Bags, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of all folds x seeds, from when the processes stand ready."""
    cells = [(head, fold, seed, size) for fold in range(FOLDS) for seed in range(SEEDS)]
    with pool(workers) as running:
        starts, ends, cpu = zip(*running.map(fit_of, *zip(*cells, strict=True)), strict=True)
    return max(ends) - min(starts), sum(cpu)


def fit_of(head: str, fold: int, seed: int, size: Bags) -> tuple[float, float, float]:
    """Start, end and CPU seconds of a fit on three folds, with a fourth for validation.

    The fifth is predicted. Clocks of the processes agree.
    """
    start, cpu = time.perf_counter(), time.process_time()
    bags, labels = size.drawn(scales_of(head))
    parts = [np.arange(len(bags)) % (FOLDS * 2) // 2 == (fold + at) % FOLDS for at in (0, 1)]
    test, val = parts
    train = ~test & ~val
    chosen = [
        ([b for b, own in zip(bags, of, strict=True) if own], labels[of]) for of in (train, val)
    ]
    fitted = made(head, size, settings_of(head, QUICK))
    fitted.fit(*chosen[0], *chosen[1], seed)
    fitted.predict([bag for bag, own in zip(bags, test, strict=True) if own])
    return start, time.perf_counter(), time.process_time() - cpu


def settings_of(head: str, profile: Path) -> Any:
    return params.load(plugins.load("heads", head).Params, f"evaluate.{head}", profile)


def trained(settings: Any, epochs: int, batch: int) -> Any:
    changes = {"epochs": epochs, "patience": epochs, "batch": batch, "balanced": False}
    changes |= {"warmup_epochs": 0.0}  # which may not be as long as so short a fit
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **changes))


def made(head: str, size: Bags, settings: Any) -> Any:
    return plugins.load("heads", head).build(scales_of(head) * size.dim, 2, settings)


def scales_of(head: str) -> int:
    return getattr(plugins.load("heads", head), "SCALES", 1)


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each; none begins before all stand ready."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, ready, (context.Barrier(workers),))


def ready(barrier: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
