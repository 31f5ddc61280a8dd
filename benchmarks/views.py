"""Stored pixels against recipes: disk, the perturb stage, and what reading them costs pretraining.

Run `python -m benchmarks.views`. Patches of 512 px at 0.25 mpp are cut from a drawn slide; times
are of one process, per patch. On a GPU the shuffle of a recipe is made there.
"""

import dataclasses
import logging
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from stages import perturb
from stages.common import cache, params, run, stores, viewset
from stages.common.viewset import ViewSet
from stages.detectors import hematoxylin
from stages.sources import synthetic

log = logging.getLogger("benchmarks.views")

PATCH_PX, MPP, BATCH, ROUNDS = 512, 0.25, 16, 5


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = params.load(perturb.PerturbParams, "perturb")
    patches, nuclei = drawn()
    with tempfile.TemporaryDirectory() as name:
        os.environ["CYTOSSL_CACHE"] = f"{name}/cache"
        data = Path(name) / "data"
        write_slide(data, patches, nuclei)
        log.info("%s, %d patches of %d px, median of %d", device, len(patches), PATCH_PX, ROUNDS)
        log.info("tile store (JPEG)  %8.1f KiB a patch", kib(data / "tile") / len(patches))
        for store in ("pixels", "recipe"):
            report(data, dataclasses.replace(settings, store=store), device)


def drawn() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Patches of one drawn slide that hold nuclei, and the (x, y) of those."""
    image, _ = synthetic.draw(
        True, np.random.default_rng(7), params.load(synthetic.Params, "cohort.synthetic")
    )
    starts = range(0, image.shape[0] - PATCH_PX + 1, PATCH_PX // 2)
    cut = [image[y : y + PATCH_PX, x : x + PATCH_PX] for y in starts for x in starts]
    detector = hematoxylin.build(params.load(hematoxylin.Params, "detect.hematoxylin"))
    points = [one.centroid_px for one in detector(np.stack(cut), MPP)]
    return zip(*[pair for pair in zip(cut, points, strict=True) if len(pair[1])], strict=True)


def write_slide(data: Path, patches: list[np.ndarray], nuclei: list[np.ndarray]) -> None:
    rows = np.repeat(np.arange(len(patches)), [len(points) for points in nuclei])
    origin = np.arange(len(patches))[:, None] * [[PATCH_PX, 0]]
    shared = {"slide_id": "s", "mpp": MPP, "slide_mpp": MPP, "input": "-"}
    centroid, ones = np.concatenate(nuclei) + origin[rows], np.ones(len(rows))

    def tile(folder: Path) -> None:
        stores.create_patches(folder / "patches.zarr", patches, origin, PATCH_PX, shared)

    def detect(folder: Path) -> None:
        stores.create_nuclei(folder / "nuclei.zarr", centroid, rows, ones, ones, shared)

    for stage, make in (("tile", tile), ("detect", detect)):
        link(data, stage, "s", make)


def link(data: Path, stage: str, name: str, make) -> None:
    key = cache.key_of(stage, name, (), {}, "")
    cache.build(stage, key, name, {}, make)
    cache.link(cache.entry(stage, key), data / stage / name)


def report(data: Path, settings: perturb.PerturbParams, device: torch.device) -> None:
    job = perturb._job("s", data / "tile" / "s", data / "detect" / "s", settings, 7)
    target = f"perturb-{settings.store}"
    begun = time.perf_counter()
    link(data, target, "s", lambda folder: perturb.make(folder, job))
    made = time.perf_counter() - begun
    views = ViewSet(data / target, data / "tile")
    read = [seconds_to_read(views, device) for _ in range(ROUNDS + 1)][1:]
    each = 1e3 / len(views)
    log.info(
        "%-18s %8.1f KiB a patch, perturb stage %6.2f ms, read and ready %6.2f ms a patch",
        settings.store, kib(data / target / "s" / store_of(settings)) / len(views),
        made * each, float(np.median(read)) * each,
    )  # fmt: skip


def store_of(settings: perturb.PerturbParams) -> str:
    return "recipe.zarr" if settings.store == "recipe" else "views.zarr"


def seconds_to_read(views: ViewSet, device: torch.device) -> float:
    begun = time.perf_counter()
    for begin in range(0, len(views), BATCH):
        rows = range(begin, min(begin + BATCH, len(views)))
        views.pixels(viewset.collate([views[row] for row in rows]), device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def kib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1024


if __name__ == "__main__":
    run.start(main)
