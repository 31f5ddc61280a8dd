"""Measure the pipeline at scale: many slides, large slides, one worker and two.

    python -m benchmarks.scale cohorts [10 100 1000]       # real dvc, from index to report, then
                                                           # with nothing to do, then one slide more
    python -m benchmarks.scale workers [24]                # tile to perturb with 1 and 2 processes
    python -m benchmarks.scale extents [20000 40000 80000] # memory against the slide's side, pixels

Each works in a copy of the repository in a temporary folder (TMPDIR) with an empty cache, on slides
that it makes (benchmarks/scale_slides.py).
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks import scale_slides
from benchmarks.chain import Cost, clone, measure, say

PYTHON = [sys.executable, "-m"]
STAGES = ("index", "cohort", "tile", "detect", "perturb", "pretrain", "embed")
PER_SLIDE = ("tile", "detect", "perturb")
REPEATS = 3
PATCHES = 4  # of a field
# What is measured is the pipeline, not the networks: an encoder of few tokens, one epoch, one head.
SETTINGS = {
    "cohort.source": "folder",
    "cohort.positive": "positive",
    "tile.patches_per_slide": PATCHES,
    "pretrain.epochs": 1,
    "pretrain.warmup_epochs": 0.1,
    "pretrain.global_px": 32,
    "pretrain.watch.probe_epochs": 0,
    "pretrain.watch.collapse_after": 1.0,
    "pretrain.dino.local_px": 16,
    "pretrain.dino.local_views": 1,
    "pretrain.dino.prototypes": 32,
    "pretrain.dino.hidden_dim": 32,
    "evaluate.heads": ["meanpool"],
    "evaluate.seeds": 1,
    "evaluate.sanity": False,
}


def settle(folder: Path, changes: dict[str, object]) -> None:
    """Write values into params.yaml by their dotted places."""
    file = folder / "params.yaml"
    values = yaml.safe_load(file.read_text("utf-8"))
    for place, value in changes.items():
        *sections, key = place.split(".")
        section = values
        for name in sections:
            section = section[name]
        if key not in section:
            raise SystemExit(f"params.yaml has no {place}: mend benchmarks/scale.py")
        section[key] = value
    file.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")


def row(name: str, cost: Cost, *more: str) -> None:
    """A line of a table."""
    figures = (f"{cost.wall_s:.1f}", f"{cost.cpu_s:.1f}", f"{cost.peak_mib:.0f}", *more)
    say(f"| {name} | {' | '.join(figures)} |")


def cohorts(counts: list[int]) -> None:
    """What each stage costs, what no change costs, what one slide more costs."""
    for count in counts or [10, 100, 1000]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            environment = clone(folder)
            settle(folder, SETTINGS)
            scale_slides.add_fields(folder / "slides", range(count))
            say(f"\n| {count} slides | wall s | CPU s | peak MiB |\n|---|---:|---:|---:|")
            for stage in STAGES:
                row(stage, measure(["dvc", "repro", stage], folder, environment))
            row("split to report", measure(["dvc", "repro"], folder, environment))
            _unchanged(folder, environment)
            _one_more(folder, environment, count)
            files = [sum(map(len, (names for *_, names in os.walk(folder / "data" / stage))))
                     for stage in (*PER_SLIDE, "embed/untrained")]  # fmt: skip
            each = ", ".join(f"{number / (count + 1):.1f}" for number in files)
            say(f"\nfiles a slide in tile, detect, perturb, embed: {each}")


def _unchanged(folder: Path, environment: dict[str, str]) -> None:
    costs = [measure(["dvc", "repro"], folder, environment) for _ in range(REPEATS)]
    row("`dvc repro`, nothing changed", sorted(costs, key=lambda one: one.wall_s)[REPEATS // 2])


def _one_more(folder: Path, environment: dict[str, str], count: int) -> None:
    """Pretraining is left out: its data changed, so that it runs anew, as it must."""
    scale_slides.add_fields(folder / "slides", range(count, count + 1))
    row("one slide more, to perturb", measure(["dvc", "repro", "perturb"], folder, environment))
    cell = ["dvc", "repro", "--single-item", "embed@untrained"]
    row("one slide more, embed with one encoder", measure(cell, folder, environment))
    for stage in PER_SLIDE:
        slides = json.loads((folder / "data" / stage / "metrics.json").read_text())["slides"]
        if slides != count + 1:
            raise SystemExit(f"{stage} has {slides} slides: it must have {count + 1}")


def workers(counts: list[int]) -> None:
    """Slides an hour and patches a second of each stage, start of the processes included."""
    count = (counts or [24])[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = clone(folder)
        slides = folder / "slides"
        slides.mkdir()
        for number in range(count):
            scale_slides.write_pyramid(slides / f"slide-{number:03d}.tif", 8192, number)
        scale_slides.write_labels(slides, "*.tif")
        settle(folder, {**SETTINGS, "tile.patches_per_slide": 200})
        for stage in ("index", "cohort"):
            measure([*PYTHON, f"stages.{stage}"], folder, environment)
        say("| stage, workers | wall s | CPU s | peak MiB | slides/h | patches/s |")
        say("|---|---:|---:|---:|---:|---:|")
        for number in (1, 2):
            settle(folder, {"engine.workers": number})
            fresh = {**environment, "CYTOSSL_CACHE": str(folder / f".cache-{number}")}
            for stage in PER_SLIDE:
                cost = measure([*PYTHON, f"stages.{stage}"], folder, fresh)
                patches = json.loads((folder / "data/tile/metrics.json").read_text())["patches"]
                rates = (count / cost.wall_s * 3600, patches / cost.wall_s)
                row(f"{stage}, {number}", cost, *(f"{rate:.0f}" for rate in rates))


def extents(sides_px: list[int]) -> None:
    """Peak memory of the stages that open slides, on two slides, one process."""
    say("| stage, side of the slide | wall s | CPU s | peak MiB |\n|---|---:|---:|---:|")
    for side_px in sides_px or [20_000, 40_000, 80_000]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            environment = clone(folder)
            slides = folder / "slides"
            slides.mkdir()
            for number in range(6):  # three of a class: one for each split
                scale_slides.write_pyramid(
                    slides / f"{number}.tif", side_px if number < 2 else 2048, number
                )
            scale_slides.write_labels(slides, "*.tif")
            settle(folder, {**SETTINGS, "tile.patches_per_slide": 100, "engine.workers": 1})
            measure([*PYTHON, "stages.index"], folder, environment)
            for stage in ("cohort", "tile", "detect"):
                cost = measure([*PYTHON, f"stages.{stage}"], folder, environment)
                row(f"{stage}, {side_px:,} px", cost)


PARTS = {"cohorts": cohorts, "workers": workers, "extents": extents}


def main() -> None:
    """Run the part that is named."""
    name, *numbers = sys.argv[1:] or [""]
    if name not in PARTS:
        raise SystemExit(f"scale got {name!r}: give one of {', '.join(PARTS)}, then numbers")
    PARTS[name]([int(number) for number in numbers])


if __name__ == "__main__":
    main()
