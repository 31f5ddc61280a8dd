"""Stage 2, tile: cut each slide's cell-bearing foreground into square patches at one resolution.

    reads   data/cohort/cohort.csv and the slides it names
    writes  data/tile/<slide>/patches.zarr   the patches (layout: stages/common/stores.py)
            data/tile/<slide>/thumbnail.jpg  the slide: chosen patches, foreground, what is blurred
            data/tile/<slide>/coverage.json  counts of positions (stages/common/coverage.py)
            data/tile/slides.csv             the same, a slide a row, and what stands out
            data/tile/histograms.csv         blur and emptiness of the whole cohort
            data/tile/metrics.json           slides, patches, failed
            data/tile/failed.csv             slides that on_error: quarantine left out

Foreground is decided per patch, at 10x, by the cells that stages/common/foreground.py finds.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from stages.common import (
    cohort,
    content,
    coverage,
    disk,
    failures,
    footprint,
    footprint_sample,
    foreground,
    params,
    perslide,
    pictures,
    readers,
    run,
    sampling,
    slides,
    stores,
)
from stages.common.perslide import Job
from stages.common.sampling import Grid

logger = logging.getLogger(__name__)

THUMBNAIL_PX = 1024
CHOSEN_RGB, CELLS_RGB, BLURRED_RGB = (0, 120, 60), (230, 120, 0), (150, 60, 200)


@dataclass(frozen=True)
class TileParams:
    """The section `tile`."""

    mpp: float  # microns per pixel of the patches
    patch_px: int  # side of a patch
    sampling: Literal["random", "densest", "grid", "all"]  # random: some foreground patches;
    # densest: those with most cells; both side by side, so that none overlap; grid: foreground
    # positions `stride_px` apart; all: background positions too
    patches_per_slide: int  # at most; 0: no limit. Of grid and all a random part beyond it is left
    stride_px: int  # for grid and all: the step, in patch pixels
    central: bool  # a patch's middle, half its side, must hold cells too; not for all
    foreground: Literal["nuclei", "cells"]  # what makes a patch foreground: nuclei; or stained
    # cells with or without, as in thin blood films
    foreground_od: float  # optical density (base 10) of nuclei above their surround, in red and
    # green; of cells above glass
    foreground_um2: float  # area of nuclei or cells that makes a patch foreground, square microns
    foreground_blur_um: float  # what has softer edges is out of focus: a Gaussian's sigma
    codec: Literal["jpeg", "zstd"]  # jpeg: 4:4:4 at quality 92; zstd: lossless, 7 times the disk

    def __post_init__(self) -> None:
        """Refuse values that make no patches."""
        limits = ("foreground_od", "foreground_um2", "foreground_blur_um")
        for name in ("mpp", "patch_px", "stride_px", *limits):
            if getattr(self, name) <= 0:
                raise ValueError(f"tile.{name} is {getattr(self, name)}: it must be above 0")
        if self.patches_per_slide < 0:
            raise ValueError(
                f"tile.patches_per_slide is {self.patches_per_slide}: it must be 0 or above"
            )


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
        code=("stages.tile", *readers.modules()),
        settings=decisive,
        on_error=params.load(failures.FailureParams).on_error,
        unit="patches",
        count=_count,
        needs=lambda missing: _needs(missing, settings),
    )
    metrics = coverage.write_tables(target, names)
    run.write_metrics(target / "metrics.json", {**metrics, "failed": len(jobs) - len(names)})
    logger.info("tile: %d patches", metrics["patches"])


def _count(folder: Path) -> int:
    return stores.count_patches(folder / "patches.zarr")


def _job(row: cohort.SlideRow, settings: TileParams, seed: int) -> Job:
    return Job(row.slide_id, (row.digest, row.mpp), {"row": row, "params": settings, "seed": seed})


def _needs(jobs: list[Job], settings: TileParams) -> disk.Needs:
    found = footprint_sample.look([job.arguments["row"] for job in jobs], settings)
    return footprint.tile(len(jobs), len(jobs) * found.patches, found.stored, settings)


def make(folder: Path, job: Job) -> None:
    """Write one slide's patch store, thumbnail and counts."""
    row, settings, seed = (job.arguments[name] for name in ("row", "params", "seed"))
    slide = slides.Slide(cohort.locate(row.path), float(row.mpp))
    slide.check_mpp(settings.mpp)
    grid = _grid(slide, settings)
    found = foreground.survey(slide, settings)
    held = content.of(found, grid, settings.patch_px, settings.foreground_blur_um)
    central = settings.central and settings.sampling != "all"
    cells = held.holds_cells(settings.foreground_um2, central)
    chosen = choose(held, cells, settings, f"{seed}:{row.slide_id}")
    if not len(chosen):
        raise ValueError(_nothing(row.slide_id, held, settings))
    corners = grid.corners[chosen]
    attributes = {
        "slide_id": row.slide_id,
        "mpp": settings.mpp,
        "slide_mpp": slide.mpp,
        "input": row.digest,
    }
    patches = slide.patches(corners, settings.patch_px, settings.mpp)
    store = folder / "patches.zarr"
    stores.create_patches(store, patches, corners, settings.patch_px, attributes, settings.codec)
    sharp = int((found.cells.blur_um <= settings.foreground_blur_um).sum())
    counts = coverage.of(held, cells, chosen, sharp, settings.patches_per_slide)
    coverage.write(folder, counts)
    picture = draw(slide, grid, chosen, cells, held.out_of_focus & ~cells)
    pictures.write_jpeg(folder / "thumbnail.jpg", picture)


def _grid(slide: slides.Slide, settings: TileParams) -> Grid:
    scale = settings.mpp / slide.mpp
    apart = settings.sampling in ("random", "densest")
    step = settings.patch_px if apart else settings.stride_px
    grid = sampling.grid((slide.width_px, slide.height_px), settings.patch_px, step, scale)
    if not len(grid):
        extent = f"{int(slide.width_px / scale)} x {int(slide.height_px / scale)} px"
        raise ValueError(
            f"slide {slide.path.name} is {extent} at {settings.mpp:g} mpp, smaller than a patch: "
            f"lower tile.patch_px ({settings.patch_px}) or take it out of the cohort"
        )
    return grid


def choose(held: content.Content, cells: np.ndarray, settings: TileParams, key: str) -> np.ndarray:
    """Indices of the positions to cut, rising; see TileParams.sampling."""
    if settings.sampling == "densest":
        area = held.middle_um2 if settings.central else held.cells_um2
        return sampling.densest(cells, settings.patches_per_slide, area)
    candidates = np.ones_like(cells) if settings.sampling == "all" else cells
    return sampling.draw(candidates, settings.patches_per_slide, key)


def _nothing(slide_id: str, held: content.Content, settings: TileParams) -> str:
    blurred = int(held.out_of_focus.sum())
    other = "cells" if settings.foreground == "nuclei" else "nuclei"
    off_centre = held.holds_cells(settings.foreground_um2, False).sum()
    if off_centre:  # so tile.central is set
        return (
            f"slide {slide_id} has no foreground: {off_centre} of its {len(held.emptiness)} "
            f"positions hold {settings.foreground} in focus, none in its middle; set tile.central "
            "to false, tile.sampling to grid with a small tile.stride_px, or take the slide out of "
            "the cohort"
        )
    return (
        f"slide {slide_id} has no foreground: none of its {len(held.emptiness)} positions holds "
        f"{settings.foreground} in focus ({blurred} are out of focus); set tile.foreground to "
        f"{other}, lower tile.foreground_od, set tile.sampling to all, or take the slide out of "
        "the cohort"
    )


def draw(
    slide: slides.Slide, grid: Grid, chosen: np.ndarray, cells: np.ndarray, blurred: np.ndarray
) -> np.ndarray:
    """The slide with its foreground and what is out of focus outlined, and the patches framed."""
    picture = slide.thumbnail(THUMBNAIL_PX).copy()
    shrink = picture.shape[1] / slide.width_px
    # Outwards: neighbours must touch, or the line around them runs between them too.
    first = np.floor(grid.corners * shrink).astype(int)
    last = np.ceil((grid.corners + grid.side) * shrink).astype(int) - 1
    for marked, colour in ((blurred, BLURRED_RGB), (cells, CELLS_RGB)):
        area = np.zeros(picture.shape[:2], np.uint8)
        for at in np.flatnonzero(marked):
            cv2.rectangle(area, first[at].tolist(), last[at].tolist(), 1, cv2.FILLED)
        outlines = cv2.findContours(area, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]
        cv2.drawContours(picture, outlines, -1, colour, 2)
    for at in chosen:
        cv2.rectangle(picture, (first[at] + 2).tolist(), (last[at] - 2).tolist(), CHOSEN_RGB, 2)
    return picture


if __name__ == "__main__":
    run.start(main)
