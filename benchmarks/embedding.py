"""How near the stage embed comes to its encoder's own limit: `python -m benchmarks.embedding`.

The limit is the encoder on random images that lie on the device, in batches of the same shape and
in as many processes. The stage reads patches from stores, decodes and prepares them, and writes
bags; its processes run and hold the encoder already ("stage"), or `embed.main` starts them and
loads it ("with start"). Both take turns; the figures are medians of patches/s, all processes
together. `--slides`, `--patches` and `--turns` make it longer or shorter, `--architecture` and
`--attention` run one. On GPUs, a process each and in bf16, slides share batches: `--slides 64
--patches 100` fills some.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch

from stages import embed
from stages.common import cache, cluster, devices, embedding, encoders, run, stores
from stages.common.perslide import Job

logger = logging.getLogger(__name__)

ARCHITECTURES = ("vit_tiny_patch16_224", "vit_small_patch16_224")
ATTENTION = {"top 16, qkv": (16, "qkv"), "dense": (0, "none")}
IMAGE_PX, TOKEN_PX, MPP = 224, 16, 0.25
SIDES_PX = (512, 128)
BATCH = {"cpu": 20, "cuda": 256}
WHITE, STAIN = np.array([236, 231, 238]), np.array([70, 40, 130])
BLUR_PX = 3.5
AUTOCAST: dict[str, embedding.Autocast] = {"cpu": "none", "cuda": "bf16"}


@dataclass(frozen=True)
class Bench:
    """One measurement, as its processes are told."""

    folder: Path  # holds tile, encoder
    device: str
    patches: int  # a slide
    batch: int
    central_crop: bool = False

    @property
    def settings(self) -> embed.EmbedParams:
        """Section embed."""
        autocast = AUTOCAST[self.device]
        return embed.EmbedParams(("encoder",), self.batch, self.central_crop, autocast, self.device)


def write_slides(source: Path, slides: int, patches: int, px: int) -> None:
    """Finished results of tile: soft blots of one stain, at 512 px about 60 KiB each."""
    rng = np.random.default_rng(7)
    attributes = {"mpp": MPP, "slide_mpp": MPP, "input": "-"}
    for number in range(slides):
        name = f"s{number}"
        noise = (cv2.GaussianBlur(rng.random((px, px)), (0, 0), BLUR_PX) for _ in range(patches))
        drawn = [cv2.normalize(one, None, 0, 1, cv2.NORM_MINMAX)[..., None] for one in noise]
        drawn = [(WHITE - one * (WHITE - STAIN)).astype(np.uint8) for one in drawn]

        def make(folder: Path, drawn: list = drawn, name: str = name) -> None:
            path, origin = folder / "patches.zarr", np.zeros((patches, 2), np.int64)
            stores.create_patches(path, drawn, origin, px, {"slide_id": name, **attributes})

        key = cache.key_of("tile", name, (str(px),), {}, "")
        cache.build("tile", key, name, {}, make)
        cache.link(cache.entry("tile", key), source / name)


def ready(worker: Any, barrier: Any) -> None:
    """What the engine does for a worker process."""
    global together
    together = barrier
    with worker.get_lock():
        os.environ[devices.WORKER] = str(worker.value)
        worker.value += 1


def timed(work: Callable[[], int], device: str) -> float:
    """Patches/s of this process, begun and ended with the others."""
    together.wait()
    begun = time.perf_counter()
    done = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return done / (time.perf_counter() - begun)


def network_of(bench: Bench) -> embedding.Network:
    folder = bench.folder / "encoder"
    digest, settings = encoders.digest_of(folder), bench.settings
    return embed._network(folder, digest, settings.device, settings.autocast)


def stage(bench: Bench, names: list[str]) -> float:
    """Slides from their stores to bags."""
    network_of(bench)  # loads it
    given = {"encoder": bench.folder / "encoder", "weights": "", "batch": bench.batch}
    settings = bench.settings
    given |= {name: getattr(settings, name) for name in ("autocast", "device", "central_crop")}
    given["weights"] = encoders.digest_of(given["encoder"])
    jobs = [
        Job(name, ("-",), {"patches": bench.folder / "tile" / name / "patches.zarr", **given})
        for name in names
    ]

    def work(some: list[Job]) -> int:
        with tempfile.TemporaryDirectory(dir=bench.folder) as place:
            folders = [Path(place) / job.slide_id for job in some]
            for folder in folders:
                folder.mkdir()
            embed.make_many(folders, some)
        return len(some) * bench.patches

    work(jobs[:1])
    return timed(lambda: work(jobs), bench.device)


def limit(bench: Bench, names: list[str]) -> float:
    """As many batches of random images, of the stage's shape, through the encoder alone."""
    network = network_of(bench)
    scales = 1 + bench.central_crop
    images = torch.randn(bench.batch, 3, IMAGE_PX, IMAGE_PX, device=network.device)
    dtype, kind = network._dtype, network.device.type

    @torch.inference_mode()
    def work(batches: int) -> int:
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            for _ in range(batches * scales):
                network.model(images)
        return batches * bench.batch

    work(1)
    return timed(lambda: work(-(-len(names) * bench.patches // bench.batch)), bench.device)


def started(bench: Bench, processes: int, slides: int) -> float:
    """`embed.main` with an empty cache, patches/s."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as place:
        os.environ["CYTOSSL_CACHE"] = f"{place}/cache"
        os.chdir(place)
        Path("params.yaml").write_text(f'engine:\n  workers: {processes}\n  scheduler: ""\n')
        begun = time.perf_counter()
        source, encoder = bench.folder / "tile", bench.folder / "encoder"
        embed.main(source, encoder, Path("embed"), bench.settings)
        seconds = time.perf_counter() - begun
        os.chdir(bench.folder)
    return slides * bench.patches / seconds


def measure(bench: Bench, processes: int, slides: int, turns: int) -> tuple[float, float, float]:
    """Patches/s of the limit, of the stage, and of the stage with its start."""
    context = get_context("spawn")
    how = (context.Value("i", 0), context.Barrier(processes))
    shares = [[f"s{n}" for n in range(at, slides, processes)] for at in range(processes)]
    rates: dict[Any, list[float]] = {limit: [], stage: []}
    with ProcessPoolExecutor(processes, context, ready, how) as pool:
        for _ in range(turns):
            for work, found in rates.items():
                found.append(sum(pool.map(work, [bench] * processes, shares)))
    return median(rates[limit]), median(rates[stage]), started(bench, processes, slides)


def main() -> None:
    """Measure and log a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedding")
    parser.add_argument("--slides", type=int, default=2, metavar="N", help="for each process")
    parser.add_argument("--patches", type=int, default=40, metavar="N", help="of a slide")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--attention", choices=list(ATTENTION), action="append")
    parser.add_argument("--central-crop", action="store_true", help="both scales")
    asked = parser.parse_args()
    device = "cuda" if devices.count() else "cpu"
    processes = devices.count() or len(os.sched_getaffinity(0))
    os.environ.update(cluster.WORKER_ENVIRONMENT)
    slides = asked.slides * processes
    batch = BATCH[device]
    if device == "cpu":  # each slide has batches of its own
        batch = embed._even(asked.patches, batch)
    say = "%s, %d processes, %d slides of %d patches, batches of %d, autocast %s"
    logger.info(say, device, processes, slides, asked.patches, batch, AUTOCAST[device])
    logger.info("| encoder | attention | patch px | limit | stage | of limit | with start |")
    logger.info("|---|---|---:|---:|---:|---:|---:|")
    for px in SIDES_PX:
        with tempfile.TemporaryDirectory() as place:
            os.environ["CYTOSSL_CACHE"] = f"{place}/cache"
            write_slides(Path(place) / "tile", slides, asked.patches, px)
            bench = Bench(Path(place), device, asked.patches, batch, asked.central_crop)
            for architecture in asked.architecture or ARCHITECTURES:
                for attention in asked.attention or ATTENTION:
                    save(bench.folder / "encoder", architecture, ATTENTION[attention], px)
                    top, own, whole = measure(bench, processes, slides, asked.turns)
                    row = "| %s | %s | %d | %.1f | %.1f | %.0f %% | %.1f |"
                    share = 100 * own / top
                    logger.info(row, architecture, attention, px, top, own, share, whole)
            os.chdir("/")


def save(folder: Path, architecture: str, attention: tuple[int, str], px: int) -> None:
    """An untrained encoder: speed does not depend on what it learned."""
    spec = encoders.EncoderSpec(
        architecture, IMAGE_PX, TOKEN_PX, *attention, encoders.MEAN, encoders.STD, px, MPP
    )
    encoders.save(folder, encoders.build(spec), spec, {})


if __name__ == "__main__":
    run.start(main)
