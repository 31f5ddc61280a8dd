"""What a step of DINO costs: against lightly, with selection, with perturbation; memory; on a GPU.

Run `python -m benchmarks.pretrain`, or one part of it: `--part step`, `memory` or `gpu`. It needs
the extra `benchmark` (lightly). Contenders take turns within one run; a figure is the median over
the turns, of the process's own CPU time where there is one thread (OMP_NUM_THREADS=1). They begin
with the same weights and get the same views; on a CPU equal losses over some steps are demanded
first, so that all do the same work. `lightly` is as its documentation writes it, `official` the
loop of facebookresearch/dino around our networks; both have timm's own attention.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import pretrain_gpu
from benchmarks.attention import median_times, peak_mib
from benchmarks.dino_setups import KINDS, PROFILES, contenders_of, random_views, settings_of
from cytossl_core.perturbation import perturb
from stages import perturb as stage
from stages.common import params
from stages.common.chance import keys_of
from stages.common.spec import EncoderSpec
from stages.common.views import make_views
from stages.methods import dino

BATCH, TURNS = 8, 5
PROTOTYPES, SIDES_PX = (1024, 4096, 16384, 65536), (224, 384, 512)  # 197, 577 and 1025 tokens
MEMORY_BATCH, MEMORY_TURNS = {"cpu": 2, "cuda": 64}, 3
NUCLEI = 20  # retained in each patch
log = logging.getLogger("benchmarks.pretrain")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = {"step": step, "memory": memory, "gpu": pretrain_gpu.measure}
    parser = argparse.ArgumentParser(description="Measure pretraining.")
    parser.add_argument("--part", choices=parts)
    chosen = parser.parse_args().part
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("%s, %d threads", device, torch.get_num_threads())
    for name in [chosen] if chosen else parts:
        parts[name](device)


def step(device: str) -> None:
    """Images/s of each contender, and the price of selection, perturbation and views."""
    for name, path in PROFILES.items():
        settings, spec = settings_of(path)
        views = random_views(BATCH, spec, settings, device)
        prepare = preparation(path, settings, spec, device)
        contenders = contenders_of(spec, settings, device, KINDS)

        def work(path, contenders=contenders, views=views, prepare=prepare):
            contenders[path].step(views) if path in contenders else prepare[path]()

        seconds = median_times(work, [*contenders, *prepare], device, TURNS)
        log.info(
            "%s: %s, 2 x %d and %d x %d px, %d prototypes, batch %d, median of %d",
            name, spec.architecture, spec.image_px, settings.local_views, settings.local_px,
            settings.prototypes, BATCH, TURNS,
        )  # fmt: skip
        for path, time_of in seconds.items():
            share = 100 * time_of / seconds["ours"]
            rate = BATCH / time_of
            log.info("%-18s %9.1f ms %8.2f images/s %6.1f %%", path, 1e3 * time_of, rate, share)
        log.info("ours is %.3f x lightly", seconds["lightly"] / seconds["ours"])


def memory(device: str) -> None:
    """Time and memory as prototypes grow, then as tokens do."""
    settings, spec = settings_of(PROFILES["paper"])
    log.info("batch %d, peak above what is held", MEMORY_BATCH[device])
    log.info("tokens prototypes contender            ms a step      peak      held")
    for prototypes in PROTOTYPES:
        compare_memory(spec, dataclasses.replace(settings, prototypes=prototypes), device)
    settings = dataclasses.replace(settings, prototypes=PROTOTYPES[0])
    for side in SIDES_PX[1:]:  # the first was measured above
        compare_memory(dataclasses.replace(spec, image_px=side), settings, device)


def compare_memory(spec: EncoderSpec, settings: dino.Params, device: str) -> None:
    views = random_views(MEMORY_BATCH[device], spec, settings, device)
    contenders = contenders_of(spec, settings, device, ("ours", "ours, top 16, qkv"))

    def work(path):
        contenders[path].step(views)

    seconds = median_times(work, list(contenders), device, MEMORY_TURNS)
    for path, time_of in seconds.items():
        log.info(
            "%6d %10d %-18s %9.1f ms %5.0f MiB %5.0f MiB",
            (spec.image_px // spec.token_px) ** 2 + 1, settings.prototypes, path, 1e3 * time_of,
            peak_mib(work, path, device), contenders[path].held_mib(),
        )  # fmt: skip


def preparation(
    path: Path, settings: dino.Params, spec: EncoderSpec, device: str
) -> dict[str, Callable[[], object]]:
    """What a batch costs before its step: the shuffle and the views, both on the device."""
    chosen, side = params.load(stage.PerturbParams, "perturb", path), spec.patch_px
    draws = torch.Generator().manual_seed(7)
    patches = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8, generator=draws)
    points = side * torch.rand(BATCH, NUCLEI, 2, generator=draws)
    keys = keys_of(7, 0, torch.arange(BATCH))
    on_device = patches.to(device), points.to(device), keys.to(device)
    policies = dino._view_policies(settings, spec.image_px)
    radius_px = chosen.radius_um / spec.mpp
    return {
        "perturb": lambda: perturb(*on_device[:2], radius_px, on_device[2]),
        "views": lambda: make_views(on_device[0], points, keys, policies, spec.mean, spec.std),
    }


if __name__ == "__main__":
    main()
