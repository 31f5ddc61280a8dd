"""Measure what detect costs where nothing has changed: 1,000 slides, all in the cache.

    python -m benchmarks.detect_cache

It copies the repository to a temporary folder, puts 1,000 small patch stores there as if the stages
before detect had run, detects once, then times the cached stage and `dvc repro detect`.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from benchmarks.chain import clone, measure, say
from stages.common import cache, cohort, stores
from stages.common.cohort import SlideRow
from stages.common.pictures import write_jpeg

SLIDES = 1000
PATCHES = 4  # a slide; what is cached costs by the slide
PX, MPP = 128, 0.5
REPEATS = 5


def draw(rng: np.random.Generator) -> UInt8[np.ndarray, "px px 3"]:
    """A patch with some dark discs of a nucleus's size."""
    patch = np.full((PX, PX, 3), (236, 231, 238), np.uint8)
    for x, y in rng.integers(10, PX - 10, (rng.poisson(4), 2)).tolist():
        cv2.circle(patch, (x, y), int(rng.integers(6, 10)), (60, 50, 110), -1)
    return patch


def prepare(folder: Path) -> None:
    """What index, cohort and tile would have left, as far as detect and DVC look at it."""
    rng = np.random.default_rng(0)
    rows = []
    for at in range(SLIDES):
        name = f"slide-{at:04d}"
        tile(folder, name, [draw(rng) for _ in range(PATCHES)])
        rows.append(SlideRow(name, "", "well", name, "train", str(MPP), ""))
    cohort.write_rows(folder / "data/cohort", rows, ["well", "ill"])
    for stage in ("cohort", "tile"):
        (folder / "data" / stage / "metrics.json").write_text(json.dumps({"slides": SLIDES}))


def tile(folder: Path, name: str, patches: list[np.ndarray]) -> None:
    """One slide's finished result of the stage tile."""
    attributes = {"slide_id": name, "mpp": MPP, "slide_mpp": MPP, "input": "-"}
    origin = np.arange(len(patches))[:, None] * np.array([[PX, 0]])

    def make(place: Path) -> None:
        stores.create_patches(place / "patches.zarr", patches, origin, PX, attributes)
        write_jpeg(place / "thumbnail.jpg", patches[0])

    key = cache.key_of("tile", name, (), {}, "")
    cache.build("tile", key, name, {}, make)
    cache.link(cache.entry("tile", key), folder / "data/tile" / name)


def main() -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = clone(folder)
        os.environ["CYTOSSL_CACHE"] = environment["CYTOSSL_CACHE"]
        prepare(folder)
        for command in ("python -m stages.index", "dvc commit --quiet --force --with-deps tile"):
            subprocess.run(command.split(), cwd=folder, env=environment, check=True)
        say("| command | wall s | CPU s | peak MiB |\n|---|---:|---:|---:|")
        for name, command, repeats in (
            ("`dvc repro detect`, first", ["dvc", "repro", "detect"], 1),
            ("`python -m stages.detect`, cached", ["python", "-m", "stages.detect"], REPEATS),
            ("`dvc repro detect` after that", ["dvc", "repro", "detect"], 1),
            ("`dvc repro detect`, nothing changed", ["dvc", "repro", "detect"], REPEATS),
        ):
            costs = [measure(command, folder, environment) for _ in range(repeats)]
            cost = sorted(costs, key=lambda one: one.wall_s)[len(costs) // 2]
            say(f"| {name} | {cost.wall_s:.2f} | {cost.cpu_s:.2f} | {cost.peak_mib:.0f} |")


if __name__ == "__main__":
    main()
