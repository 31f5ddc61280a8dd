"""Stage 4, perturb: keep some nuclei of every patch and shuffle the pixels around them.

    reads   data/tile/<slide>/patches.zarr, data/detect/<slide>/nuclei.zarr
    writes  data/perturb/<slide>/views.zarr    perturbed patches, the retained nuclei of each
            data/perturb/<slide>/recipe.zarr   in its place with perturb.store recipe: no pixels
            data/perturb/<slide>/examples.jpg  some patches, original beside perturbed
            data/perturb/metrics.json          slides, views, points, failed, ...
            data/perturb/failed.csv            slides that on_error: quarantine left out

Run it with `dvc repro perturb`; its settings are the `perturb` section of params.yaml. With
`perturb.enabled: false` nuclei-centered perturbation is off altogether: every patch passes
unchanged and no points are kept, so that crops fall anywhere, as in plain DINO.

Shuffled pixels hardly compress: views.zarr takes about half a megabyte for each patch of 512 px. A
recipe takes some bytes, and pretrain makes the same bits of it and of the tile store, on its
device: take it for more than some hundred thousand patches, or where a GPU does the work.
"""

import hashlib
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from cytossl_core.perturbation import near_points, perturb
from stages.common import (
    cache,
    disk,
    failures,
    footprint,
    headers,
    params,
    perslide,
    pictures,
    run,
    stores,
)
from stages.common.perslide import Job

logger = logging.getLogger(__name__)

EXAMPLES = 6  # pairs in examples.jpg, two a row
EXAMPLE_PX = 384
MARK_RGB = (0, 140, 70)


@dataclass(frozen=True)
class PerturbParams:
    """The section `perturb`."""

    store: Literal["pixels", "recipe"]  # recipe: pretrain shuffles; the same bits, no disk
    enabled: bool  # false: patches pass unchanged and crops are not centered on nuclei
    retain_share: float  # of a patch's nuclei, above 0 to 1; at least one nucleus is retained
    radius_um: float  # of the discs left unshuffled, microns; the paper's 50 px at 40x are 12.5

    def __post_init__(self) -> None:
        """Refuse values that retain nothing."""
        if not 0 < self.retain_share <= 1:
            raise ValueError(
                f"perturb.retain_share is {self.retain_share}: it must be above 0, up to 1"
            )
        if not 0 < self.radius_um < math.inf:
            raise ValueError(f"perturb.radius_um is {self.radius_um}: it must be above 0")


@dataclass(frozen=True)
class View:
    """One row of the view store before its pixels are made."""

    source: int  # row of the tile store
    points: np.ndarray  # float32 [points, 2]: retained nuclei, (x, y) in patch pixels
    seed: int  # of the shuffle, int64


def main(
    source: Path = Path("data/tile"),
    nuclei: Path = Path("data/detect"),
    target: Path = Path("data/perturb"),
) -> None:
    """Make the views of every slide that has patches and nuclei."""
    settings = params.load(PerturbParams, "perturb")
    seed = params.load(params.Top).seed
    left_out = failures.read(nuclei)
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    names = [name for name in names if name not in left_out]
    jobs = [_job(name, source / name, nuclei / name, settings, seed) for name in names]
    decisive = {**asdict(settings), "seed": seed}
    made = perslide.run(
        "perturb",
        make,
        jobs,
        target,
        code=("stages.perturb",),
        settings=decisive,
        on_error=params.load(failures.FailureParams).on_error,
        unit="patches",
        needs=lambda missing: _needs(missing, settings.store),
    )
    metrics = _metrics([target / name for name in made])
    if not metrics["views"]:
        raise ValueError(
            f"none of {len(made)} slides has a nucleus in any patch: look at {nuclei}/*/"
            "overlay.jpg and make the detector less strict (section detect of params.yaml), or "
            "set perturb.enabled to false"
        )
    run.write_metrics(target / "metrics.json", {**metrics, "failed": len(names) - len(made)})
    logger.info("perturb: %(views)d views around %(points)d nuclei", metrics)


def _job(name: str, tiles: Path, found: Path, settings: PerturbParams, seed: int) -> Job:
    inputs = (cache.content(tiles), cache.content(found))
    arguments = {"tiles": tiles.resolve(), "nuclei": found.resolve()}
    patches = stores.count_patches(tiles / "patches.zarr")
    return Job(name, inputs, {**arguments, "params": settings, "seed": seed}, work=patches)


def _needs(jobs: list[Job], store: str) -> disk.Needs:
    tiles = [job.arguments["tiles"] for job in jobs]
    shuffled = footprint.shuffled_bytes(tiles) if store == "pixels" else 0.0
    return footprint.perturb(len(jobs), footprint.cut_patches(tiles), shuffled, store)


def _metrics(folders: list[Path]) -> dict[str, float]:
    """Of all slides, from what stands at the head of their stores: thousands are quickly read."""
    found = [path for folder in folders for path in folder.glob("*.zarr")]
    attributes = [headers.attributes(path) for path in found]
    views = [headers.length(path, "source") for path in found]
    count = sum(views)
    kept = sum(one["pixels_kept"] * own for one, own in zip(attributes, views, strict=True))
    return {
        "slides": len(found),
        "views": count,
        "points": sum(headers.length(path, "point") for path in found),
        "patches_without_nuclei": sum(one["patches_unused"] for one in attributes),
        "pixels_kept": kept / count if count else 0.0,
    }


def make(folder: Path, job: Job) -> None:
    """Write one slide's views, or the recipe of them, and examples."""
    settings = job.arguments["params"]
    patches = stores.open_patches(job.arguments["tiles"] / "patches.zarr")
    found = stores.open_nuclei(job.arguments["nuclei"] / "nuclei.zarr")
    views = choose(patches, found, settings, job.arguments["seed"])
    radius_px = settings.radius_um / patches.attributes["mpp"] if settings.enabled else 0.0
    kept = [_kept_share(view.points, radius_px, patches.patch_px) for view in views]
    attributes = {
        **{name: patches.attributes[name] for name in ("slide_id", "mpp", "slide_mpp")},
        "input": "+".join(job.inputs),
        "patches_unused": len(patches) - len(views),
        "pixels_kept": float(np.mean(kept)) if views else 0.0,
    }
    points = np.concatenate([np.empty((0, 2)), *(view.points for view in views)])
    index = np.repeat(np.arange(len(views)), [len(view.points) for view in views])
    source = np.array([view.source for view in views], dtype=np.int64)
    if settings.store == "recipe":
        seeds = np.array([view.seed for view in views], dtype=np.int64)
        recipe = {**attributes, "radius_px": radius_px}
        stores.create_recipe(folder / "recipe.zarr", points, index, source, seeds, recipe)
    else:
        pixels = (_pixels(patches, view, radius_px) for view in views)
        side = patches.patch_px
        stores.create_views(folder / "views.zarr", pixels, points, index, source, side, attributes)
    _draw(patches, views, radius_px, folder / "examples.jpg")


def choose(
    patches: stores.PatchStore, found: stores.Nuclei, settings: PerturbParams, seed: int
) -> list[View]:
    """The patches that become views, in their order, and the nuclei that each retains.

    What is drawn depends on (seed, slide id, row of the patch) alone: never on other patches.
    """
    if not settings.enabled:
        return [View(row, np.empty((0, 2), np.float32), 0) for row in range(len(patches))]
    scale = patches.attributes["slide_mpp"] / patches.attributes["mpp"]
    views = []
    for row in np.unique(found.patch_index).tolist():
        mine = np.flatnonzero(found.patch_index == row)
        # In float64: level-0 positions of large slides use most of float32's digits.
        offset = found.centroid[mine].astype(np.float64) - patches.origin[row]
        generator = _generator(seed, patches.attributes["slide_id"], row)
        shuffle_seed = int(generator.integers(-(2**63), 2**63))
        count = max(1, round(settings.retain_share * len(mine)))
        chosen = np.sort(generator.random(len(mine)).argsort(kind="stable")[:count])
        views.append(View(row, (offset[chosen] * scale).astype(np.float32), shuffle_seed))
    return views


def _generator(seed: int, slide_id: str, row: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\n{slide_id}\n{row}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _kept_share(points: np.ndarray, radius_px: float, patch_px: int) -> float:
    if not radius_px:
        return 1.0
    kept = near_points(torch.from_numpy(points)[None], radius_px, patch_px, patch_px)
    return kept.sum().item() / patch_px**2


def _pixels(patches: stores.PatchStore, view: View, radius_px: float) -> np.ndarray:
    patch = patches[view.source]
    if not radius_px:
        return patch
    image = torch.from_numpy(patch.transpose(2, 0, 1).copy())[None]
    points = torch.from_numpy(view.points)[None]
    return perturb(image, points, radius_px, torch.tensor([view.seed]))[0].permute(1, 2, 0).numpy()


def _draw(patches: stores.PatchStore, views: list[View], radius_px: float, file: Path) -> None:
    """A contact sheet: some views, spread over the slide, each beside its original."""
    chosen = np.unique(np.linspace(0, max(len(views) - 1, 0), EXAMPLES).astype(int))[: len(views)]
    pairs = [_pair(patches, views[at], radius_px) for at in chosen.tolist()]
    blank = np.full((EXAMPLE_PX, 2 * EXAMPLE_PX, 3), 255, np.uint8)
    pairs += [blank] * (len(pairs) % 2 or 2 * (not pairs))
    sheet = np.vstack([np.hstack(pairs[at : at + 2]) for at in range(0, len(pairs), 2)])
    pictures.write_jpeg(file, sheet)


def _pair(patches: stores.PatchStore, view: View, radius_px: float) -> np.ndarray:
    pair = [patches[view.source], _pixels(patches, view, radius_px)]
    pair = [np.array(picture, order="C") for picture in pair]  # a copy to draw on
    for picture in pair:
        for x, y in view.points:
            cv2.circle(picture, (int(x), int(y)), patches.patch_px // 36, MARK_RGB, 2)
    size = (EXAMPLE_PX, EXAMPLE_PX)
    return np.hstack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in pair])


if __name__ == "__main__":
    run.start(main)
