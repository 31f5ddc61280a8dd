"""Measure the reading of patches against OpenSlide patch by patch, as TRIDENT and CLAM read.

    python -m benchmarks.reading [SIDE_PX [SLIDE ...]]

Both read the same file in the same run and number of processes, turn by turn: `Slide.patches`, and
`OpenSlide.read_region(...).convert("RGB")`. The file is a pyramid of SIDE_PX (20,480) with Aperio's
description, 256-px JPEG tiles (4:2:2, quality 80), a mosaic of drawn fields; further slides may be
named. Opening the slide counts. Every patch is compared. The floor is what decoding the JPEG tiles
that the patches need takes, each once, and nothing else.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile
from jaxtyping import Int64, UInt8

from benchmarks.chain import say
from stages.common import params
from stages.common.slides import Slide
from stages.common.tiff import Tiles
from stages.sources import synthetic

SIDE_PX, FIELD_PX, TILE_PX, PATCH_PX = 20480, 2048, 256, 512
FIELDS = 3  # drawn; the mosaic takes them in turn
STEPS = (1, 4, 16)
MPP = 0.25
RANDOM = 100
REPEATS = 5
PROCESSES = (1, 2)
COLUMNS = (
    "slide",
    "patches",
    "processes",
    "OpenSlide, patches/s",
    "ours, patches/s",
    "times",
    "JPEG decoding's share",
    "equal",
)


def tiles_of(fields: list[UInt8[np.ndarray, "px px 3"]], step: int, side: int) -> Iterator:
    """The mosaic's tiles at one level, row by row."""
    small = [cv2.resize(f, None, fx=1 / step, fy=1 / step, interpolation=3) for f in fields]
    extent = len(small[0])
    for y in range(0, side // step, TILE_PX):
        for x in range(0, side // step, TILE_PX):
            tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
            for top in range(y, min(y + TILE_PX, side // step), extent):
                for left in range(x, min(x + TILE_PX, side // step), extent):
                    field = small[(top // extent * 7 + left // extent) % len(small)]
                    part = field[top % extent :, left % extent :][:TILE_PX, :TILE_PX]
                    under = tile[top - y :, left - x :][: len(part), : part.shape[1]]
                    under[:] = part[: len(under), : under.shape[1]]
            yield tile


def draw(path: Path, side: int) -> None:
    """Write the pyramid."""
    looks = params.load(synthetic.Params, "cohort.synthetic")
    looks = replace(looks, width_px=FIELD_PX, height_px=FIELD_PX, mpp=MPP)
    fields = [synthetic.draw(True, np.random.default_rng(n), looks)[0] for n in range(FIELDS)]
    about = f"Aperio Image Library\r\n{side}x{side} mosaic|AppMag = 40|MPP = {MPP}"
    with tifffile.TiffWriter(path) as tiff:
        for step in STEPS:
            tiff.write(
                tiles_of(fields, step, side),
                shape=(side // step, side // step, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 1),
                compression="jpeg",
                compressionargs={"level": 80},
                subfiletype=int(step > 1),
                description=about,
                metadata=None,
            )


def ours(path: Path, corners: Int64[np.ndarray, "patch 2"]) -> Iterator[np.ndarray]:
    with Slide(path, MPP) as slide:
        yield from slide.patches(corners, PATCH_PX, MPP)


def theirs(path: Path, corners: Int64[np.ndarray, "patch 2"]) -> Iterator[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        for x0, y0 in corners.tolist():
            region = slide.read_region((x0, y0), 0, (PATCH_PX, PATCH_PX))
            yield np.asarray(region.convert("RGB"))


def floor(path: Path, corners: Int64[np.ndarray, "patch 2"]) -> Iterator[None]:
    """Decode the tiles under the patches, each once; one step a patch."""
    with openslide.OpenSlide(path) as slide:
        dimensions = slide.level_dimensions
    tiles, done = Tiles(path, dimensions), set()
    for x0, y0 in corners.tolist():
        for at in tiles.under(0, x0, y0, PATCH_PX, PATCH_PX):
            if at not in done:
                tiles.decode(0, at)
                done.add(at)
        yield
    tiles.close()


def exhaust(way: Callable, path: Path, corners: Int64[np.ndarray, "patch 2"]) -> None:
    for _ in way(path, corners):
        pass


def seconds(pool: ProcessPoolExecutor, way: Callable, path: Path, shares: list) -> float:
    """Wall time for all shares, one a process."""
    begun = time.perf_counter()
    for future in [pool.submit(exhaust, way, path, share) for share in shares]:
        future.result()
    return time.perf_counter() - begun


def compare(path: Path, what: str, corners: Int64[np.ndarray, "patch 2"]) -> None:
    """Time all ways turn by turn and print a line for each number of processes."""
    pairs = zip(ours(path, corners), theirs(path, corners), strict=True)
    equal = sum(np.array_equal(one, other) for one, other in pairs)
    for processes in PROCESSES:
        shares = np.array_split(corners, processes)
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for way in (theirs, ours, floor):  # imports
                seconds(pool, way, path, [share[:1] for share in shares])
            times = {way: [] for way in (theirs, ours, floor)}
            for _ in range(REPEATS):
                for way, found in times.items():
                    found.append(seconds(pool, way, path, shares))
        slow, fast, least = (statistics.median(found) for found in times.values())
        say(
            f"| {path.name} | {what} | {processes} | {len(corners) / slow:,.0f} | "
            f"{len(corners) / fast:,.0f} | {slow / fast:.1f} x | {least / fast:.0%} | "
            f"{equal} of {len(corners)} |"
        )


def measure(path: Path) -> None:
    """Dense and random patches of one slide."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
    columns, rows = (np.arange(0, side - PATCH_PX + 1, PATCH_PX) for side in (width, height))
    compare(path, "dense", np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2))
    inside = (width - PATCH_PX, height - PATCH_PX)
    drawn = np.random.default_rng(0).integers(0, inside, (RANDOM, 2))
    compare(path, "random", drawn[np.lexsort(drawn.T)])


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else SIDE_PX
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"mosaic-{side}.svs"
        draw(path, side)
        say(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB, patches of {PATCH_PX} px\n")
        say(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}")
        for slide in (path, *map(Path, sys.argv[2:])):
            measure(slide)


if __name__ == "__main__":
    main()
