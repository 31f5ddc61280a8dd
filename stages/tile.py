"""Stage 2, tile: cut each slide's cell-bearing foreground into square patches at one resolution.

    reads   data/cohort/cohort.csv and the slides it names
    writes  data/tile/<slide>/patches.zarr   the patches (layout: stages/common/stores.py)
            data/tile/<slide>/thumbnail.jpg  the slide with the chosen patches drawn
            data/tile/metrics.json           slides, patches, failed
            data/tile/failed.csv             slides that on_error: quarantine left out

Foreground is decided per patch at 10x: a thumbnail's tissue mask loses isolated nuclei or keeps
the whole slide. A patch is foreground when it holds enough pixels that are dark in every colour
channel against the slide's own background: nuclei are, cytoplasm of either stain is not.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from stages.common import (
    appetite,
    cohort,
    disk,
    failures,
    params,
    perslide,
    pictures,
    portions,
    run,
    slides,
    stores,
)
from stages.common.perslide import Job

logger = logging.getLogger(__name__)

FOREGROUND_MPP = 1.0
THUMBNAIL_PX = 1024
BACKGROUND_PERCENTILE = 90  # cytology slides are mostly bright and empty
MARK_RGB = (0, 120, 60)


@dataclass(frozen=True)
class TileParams:
    """The section `tile`."""

    mpp: float  # microns per pixel of the patches
    patch_px: int  # side of a patch
    sampling: Literal["random", "grid", "all"]  # random: some foreground patches that do not
    # overlap; grid: every foreground position, `stride_px` apart; all: background positions too
    patches_per_slide: int  # for random: at most so many
    stride_px: int  # for grid and all: the step, in patch pixels
    foreground_od: float  # optical density above background that counts as dark; 0.2 for Pap
    foreground_um2: float  # dark area that makes a patch foreground, square microns
    codec: Literal["jpeg", "zstd"]  # jpeg: 4:4:4 at quality 92; zstd: lossless, 7 times the disk

    def __post_init__(self) -> None:
        """Refuse values that make no patches."""
        for name in ("mpp", "patch_px", "patches_per_slide", "stride_px", "foreground_od"):
            if getattr(self, name) <= 0:
                raise ValueError(f"tile.{name} is {getattr(self, name)}: it must be above 0")


def main(target: Path = Path("data/tile")) -> None:
    """Tile every slide of the cohort."""
    settings = params.load(TileParams, "tile")
    seed = params.load(params.Top).seed
    jobs = [_job(row, settings, seed) for row in cohort.read_rows()]
    decisive = {**asdict(settings), "seed": seed}
    names = perslide.run(
        "tile",
        make,
        jobs,
        target,
        code=("stages.tile",),
        settings=decisive,
        on_error=params.load(failures.FailureParams).on_error,
        unit="patches",
        count=_count,
        needs=lambda missing: _needs(missing, settings),
    )
    counts = [_count(target / name) for name in names]
    metrics = {"slides": len(names), "patches": sum(counts), "fewest_patches": min(counts)}
    run.write_metrics(target / "metrics.json", {**metrics, "failed": len(jobs) - len(names)})
    logger.info("tile: %d patches", sum(counts))


def _count(folder: Path) -> int:
    return stores.count_patches(folder / "patches.zarr")


def _job(row: cohort.SlideRow, settings: TileParams, seed: int) -> Job:
    return Job(row.slide_id, (row.digest, row.mpp), {"row": row, "params": settings, "seed": seed})


def _needs(jobs: list[Job], settings: TileParams) -> disk.Needs:
    found = portions.portion([job.arguments["row"] for job in jobs], settings)
    return appetite.tile(len(jobs), len(jobs) * found.patches, found.stored, settings)


def make(folder: Path, job: Job) -> None:
    """Write one slide's patch store and thumbnail."""
    row, settings, seed = (job.arguments[name] for name in ("row", "params", "seed"))
    slide = slides.Slide(cohort.locate(row.path), float(row.mpp))
    slide.check_mpp(settings.mpp)
    corners = _grid(slide, settings)
    if settings.sampling != "all":
        corners = corners[foreground(slide, corners, settings)]
    if not len(corners):
        raise ValueError(
            f"slide {row.slide_id} has no foreground: lower tile.foreground_od, set tile.sampling "
            "to all, or take the slide out of the cohort"
        )
    if settings.sampling == "random":
        corners = _sample(corners, settings.patches_per_slide, f"{seed}:{row.slide_id}")
    attributes = {
        "slide_id": row.slide_id,
        "mpp": settings.mpp,
        "slide_mpp": slide.mpp,
        "input": row.digest,
    }
    patches = slide.patches(corners, settings.patch_px, settings.mpp)
    store = folder / "patches.zarr"
    stores.create_patches(store, patches, corners, settings.patch_px, attributes, settings.codec)
    _draw(slide, corners, settings, folder / "thumbnail.jpg")


def _grid(slide: slides.Slide, settings: TileParams) -> np.ndarray:
    """Top-left corners of all positions, int64 [position, 2], level-0 pixels, row by row."""
    scale = settings.mpp / slide.mpp
    step = settings.patch_px if settings.sampling == "random" else settings.stride_px
    columns, rows = (
        np.round(np.arange(0, side / scale - settings.patch_px + 1e-6, step) * scale)
        for side in (slide.width_px, slide.height_px)
    )
    if not len(columns) or not len(rows):
        extent = f"{int(slide.width_px / scale)} x {int(slide.height_px / scale)} px"
        raise ValueError(
            f"slide {slide.path.name} is {extent} at {settings.mpp:g} mpp, smaller than a patch: "
            f"lower tile.patch_px ({settings.patch_px}) or take it out of the cohort"
        )
    return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2).astype(np.int64)


def foreground(slide: slides.Slide, corners: np.ndarray, settings: TileParams) -> np.ndarray:
    """Which positions hold cells, bool [position]; the slide is read once, in rows of patches."""
    mpp = max(FOREGROUND_MPP, settings.mpp)
    side = max(1, round(settings.patch_px * settings.mpp / mpp))
    white = np.percentile(slide.thumbnail(THUMBNAIL_PX), BACKGROUND_PERCENTILE, axis=(0, 1))
    enough = max(1.0, settings.foreground_um2 / mpp**2)
    chosen = np.zeros(len(corners), dtype=bool)
    for y0, strip in _strips(slide, corners, side, mpp):
        dark = _dark(strip, white, settings.foreground_od)
        area = cv2.integral(dark.astype(np.uint8))
        for at in np.flatnonzero(corners[:, 1] == y0):
            left = min(round(corners[at, 0] * slide.mpp / mpp), dark.shape[1] - 1)
            right = min(left + side, dark.shape[1])
            chosen[at] = area[-1, right] - area[-1, left] >= enough
    return chosen


def _strips(
    slide: slides.Slide, corners: np.ndarray, side: int, mpp: float
) -> Iterator[tuple[int, np.ndarray]]:
    width = int(slide.width_px * slide.mpp / mpp)
    for y0 in np.unique(corners[:, 1]):
        yield int(y0), slide.read(0, int(y0), max(width, side), side, mpp)


def _dark(pixels: np.ndarray, white: np.ndarray, density: float) -> np.ndarray:
    """Where the smallest optical density over the channels exceeds `density`."""
    limit = np.maximum(white, 1) * 10**-density
    return (pixels < limit).all(axis=-1)


def _sample(corners: np.ndarray, count: int, key: str) -> np.ndarray:
    """`count` of the positions, in their order; the draw depends on seed and slide id alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    drawn = np.random.default_rng(number).permutation(len(corners))[:count]
    return corners[np.sort(drawn)]


def _draw(slide: slides.Slide, corners: np.ndarray, settings: TileParams, file: Path) -> None:
    picture = slide.thumbnail(THUMBNAIL_PX).copy()
    shrink = picture.shape[1] / slide.width_px
    side = settings.patch_px * settings.mpp / slide.mpp
    for x0, y0 in corners:
        first = (int(x0 * shrink), int(y0 * shrink))
        last = (int((x0 + side) * shrink) - 1, int((y0 + side) * shrink) - 1)
        cv2.rectangle(picture, first, last, MARK_RGB, 2)
    pictures.write_jpeg(file, picture)


if __name__ == "__main__":
    run.start(main)
