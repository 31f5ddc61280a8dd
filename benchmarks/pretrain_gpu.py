"""The part of benchmarks/pretrain.py that needs a GPU: speed, memory and use of it, in bf16."""

import dataclasses
import functools
import logging
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention import median_times, peak_mib, synchronise
from benchmarks.dino_setups import KINDS, PROFILES, TINY, contenders_of, random_views, settings_of
from benchmarks.dino_steps import Contender
from benchmarks.views import drawn, link, write_slide
from stages import perturb as stage
from stages.common import params, viewset
from stages.common.chance import keys_of
from stages.common.spec import EncoderSpec
from stages.common.views import make_views
from stages.common.viewset import ViewSet
from stages.methods import dino

SMALL = "vit_small_patch16_224"
BATCH, TURNS, LOADED_STEPS, MATMUL = 64, 20, 60, 8192
log = logging.getLogger("benchmarks.pretrain")


def measure(device: str) -> None:
    """Speed, memory and use of a GPU, in bf16, alone and behind the loader."""
    if device != "cuda":
        log.info("gpu: left out, torch sees no CUDA device")
        return
    most = matmul_flops(device)
    log.info(
        "%s, bf16 products of %d: %.0f TFLOP/s", torch.cuda.get_device_name(), MATMUL, most / 1e12
    )
    settings, spec = settings_of(PROFILES["paper"])
    with tempfile.TemporaryDirectory() as name:
        stores = small_stores(Path(name))
        for architecture in (TINY, SMALL):
            use_gpu(dataclasses.replace(spec, architecture=architecture), settings, stores, most)


def use_gpu(
    spec: EncoderSpec, settings: dino.Params, stores: dict[str, ViewSet], most: float
) -> None:
    views = random_views(BATCH, spec, settings, "cuda")
    contenders = contenders_of(spec, settings, "cuda", KINDS)

    def work(path):
        contenders[path].step(views)

    seconds = median_times(work, list(contenders), "cuda", TURNS)
    flops = flops_of(contenders["ours"], views)
    for path, time_of in seconds.items():
        log.info(
            "%s %-18s %8.1f ms %8.1f images/s, peak %6.0f MiB, %4.1f %% of the products' FLOP/s",
            spec.architecture, path, 1e3 * time_of, BATCH / time_of,
            peak_mib(work, path, "cuda"), 100 * flops / time_of / most,
        )  # fmt: skip
    workers = os.cpu_count() or 1
    for store, data in stores.items():
        rate, waited, busy = behind_loader(
            contenders["ours, top 16, qkv"], data, spec, BATCH, LOADED_STEPS, workers, "cuda"
        )
        log.info(
            "%s, loader (%s, %d workers): %.1f images/s, %.1f %% waiting, GPU busy %.1f %%",
            spec.architecture, store, workers, rate, 100 * waited, 100 * busy,
        )  # fmt: skip


def behind_loader(
    contender: Contender,
    data: ViewSet,
    spec: EncoderSpec,
    batch: int,
    steps: int,
    workers: int,
    device: str,
) -> tuple[float, float, float]:
    """Images/s, the share of time in which a batch was waited for, and that of busy kernels.

    The store is small and lies in the page cache: the disk is not measured.
    """
    rng = np.random.default_rng(7)
    half = steps // 2  # of warming up, in which the workers start
    rows = (rng.integers(len(data), size=batch).tolist() for _ in range(half + steps))
    batches = iter(viewset.loader(data, rows, workers, pinned=device == "cuda"))

    def take(count: int) -> tuple[float, float]:
        waited, begun = 0.0, time.perf_counter()
        for _ in range(count):
            before = time.perf_counter()
            found = next(batches)
            waited += time.perf_counter() - before
            keys, pixels = keys_of(7, 0, found.rows), data.pixels(found, torch.device(device))
            policies = contender.network.view_policies
            contender.step(make_views(pixels, found.points, keys, policies, spec.mean, spec.std))
        synchronise(device)
        return time.perf_counter() - begun, waited

    take(half)
    seconds, waited = take(steps - half)
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as trace:  # apart, since it slows
        traced, _ = take(half)
    events = trace.profiler.kineto_results.events()
    busy = sum(e.duration_ns() for e in events if e.device_type() == DeviceType.CUDA) / 1e9
    return (steps - half) * batch / seconds, waited / seconds, busy / traced


def small_stores(folder: Path) -> dict[str, ViewSet]:
    """A drawn slide through the perturb stage, as pixels and as recipes."""
    os.environ["CYTOSSL_CACHE"] = f"{folder}/cache"
    write_slide(folder, *drawn())
    made = {}
    for store in ("pixels", "recipe"):
        settings = params.load(stage.PerturbParams, "perturb")
        settings = dataclasses.replace(settings, store=store)
        job = stage._job("s", folder / "tile" / "s", folder / "detect" / "s", settings, 7)
        link(folder, f"perturb-{store}", "s", functools.partial(stage.make, job=job))
        made[store] = ViewSet(folder / f"perturb-{store}", folder / "tile")
    return made


def matmul_flops(device: str) -> float:
    """FLOP/s of a large bf16 product, the most that a model could reach here."""
    left, right = torch.randn(2, MATMUL, MATMUL, device=device, dtype=torch.bfloat16)
    seconds = median_times(lambda _: left @ right, ["product"], device, TURNS)
    return 2 * MATMUL**3 / seconds["product"]


def flops_of(contender: Contender, views: list[Tensor]) -> int:
    """FLOPs of the products in one step; selected attention counts as the dense one it replaces."""
    with FlopCounterMode(display=False) as counter:
        contender.step(views)
    return counter.get_total_flops()
