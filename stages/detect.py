"""Stage 3, detect: find the nuclei of every patch, once; all later stages read them.

    reads   data/tile/<slide>/patches.zarr
    writes  data/detect/<slide>/nuclei.zarr  centroids, radii, scores (stages/common/stores.py)
            data/detect/<slide>/overlay.jpg  some patches with their nuclei drawn
            data/detect/<slide>/tally.json   counts and radii in short (stages/common/tally.py)
            data/detect/slides.csv           a slide a row, odd ones flagged (common/quality.py)
            data/detect/overall.csv          what is odd of all slides alike, as a wrong mpp
            data/detect/metrics.json         slides, patches, nuclei, failed, ...
            data/detect/failed.csv           slides that on_error: quarantine left out

Run it with `dvc repro detect`; its settings are the `detect` section of params.yaml, those of the
detector in `detect.<detector>`. A slide is detected anew when its patches, the detector's settings,
code, libraries or the content of its weights change (stages/index.py tells DVC of the latter two),
or the layout of what is stored; not when the overlay is drawn otherwise. On a CPU each process
holds a copy of the network (cpsam: 1.2 GB): `engine.workers` bounds their number. Each patch stands
alone: where patches overlap (tile.sampling grid or all, with tile.stride_px below tile.patch_px), a
nucleus in the overlap is listed once for each patch that shows it.
"""

import functools
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from stages.common import (
    cache,
    failures,
    footprint,
    params,
    perslide,
    plugins,
    quality,
    run,
    stores,
    tally,
)
from stages.common.perslide import Job
from stages.detectors import Detection, Detector, _batches, _overlay

logger = logging.getLogger(__name__)

# Params of detectors that are not in the cache key: where the weights lie (their content is in the
# version), how many at once they run, and which device (its kind is in the key: GPUs use 16 bits).
INDIFFERENT = frozenset({"weights", "sha256", "device", "batch_tiles"})


@dataclass(frozen=True)
class DetectParams:
    """The section `detect`."""

    detector: str  # name of a file in stages/detectors
    batch_patches: int  # patches given to the detector at once; changes memory and speed only

    def __post_init__(self) -> None:
        """Refuse an empty batch."""
        if self.batch_patches < 1:
            raise ValueError(f"detect.batch_patches is {self.batch_patches}: it must be 1 or more")


def main(source: Path = Path("data/tile"), target: Path = Path("data/detect")) -> None:
    """Detect the nuclei of every slide that has patches.

    Raises:
        FileNotFoundError: the patches, or the detector's weights, are missing.
        ValueError: slides failed, or a param is wrong.
    """
    settings = params.load(DetectParams, "detect")
    plugin = plugins.load("detectors", settings.detector)
    own = params.load(plugin.Params, f"detect.{settings.detector}")
    # Built here too: missing weights end the stage before its workers start.
    detector = _detector(settings.detector, own)
    decisive = {name: value for name, value in asdict(own).items() if name not in INDIFFERENT}
    if not source.is_dir():
        raise FileNotFoundError(f"no {source}: run `dvc repro tile` first")
    names = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
    kind = detector.device.split(":")[0]
    made = perslide.run(
        "detect",
        make,
        [_job(name, source / name, settings, own) for name in names],
        target,
        code=("stages.detect", plugin.__name__),
        settings={**decisive, "version": detector.version, "device": kind},
        on_error=params.load(failures.FailureParams).on_error,
        device=kind,
        unit="patches",
        needs=lambda missing: footprint.detect(len(missing), sum(job.work for job in missing)),
    )
    metrics = quality.write(target, made)
    run.write_metrics(target / "metrics.json", {**metrics, "failed": len(names) - len(made)})
    logger.info("detect: %(nuclei)d nuclei in %(patches)d patches", metrics)


def _job(name: str, tiles: Path, settings: DetectParams, own: Any) -> Job:
    arguments = {"tiles": tiles.resolve(), "params": settings, "own": own}
    patches = stores.count_patches(tiles / "patches.zarr")
    return Job(name, (cache.content(tiles),), arguments, work=patches)


@functools.cache
def _detector(name: str, own: Any) -> Detector:
    """One a process: a worker reads the weights for its first slide only."""
    return plugins.load("detectors", name).build(own)


def make(folder: Path, job: Job) -> None:
    """Write one slide's nuclei and overlay."""
    patches = stores.open_patches(job.arguments["tiles"] / "patches.zarr")
    if not len(patches):
        raise ValueError(f"slide {job.slide_id} has no patches: run `dvc repro tile`")
    settings = job.arguments["params"]
    detector = _detector(settings.detector, job.arguments["own"])
    batches = _batches.of(detector, settings.batch_patches)
    found = list(batches(patches, patches.attributes["mpp"]))
    rows = np.repeat(np.arange(len(found)), [len(one.score) for one in found])
    empty = Detection(np.empty((0, 2), np.float32), *[np.empty(0, np.float32)] * 2)
    centroid_px, radius_um, score = (
        np.concatenate([getattr(one, name) for one in (empty, *found)])
        for name in ("centroid_px", "radius_um", "score")
    )
    attributes = {
        **{name: patches.attributes[name] for name in ("slide_id", "mpp", "slide_mpp")},
        "input": "+".join(job.inputs),
    }
    centroid = _level0(patches, rows, centroid_px)
    stores.create_nuclei(folder / "nuclei.zarr", centroid, rows, radius_um, score, attributes)
    limits_um = _limits(job.arguments["own"])
    tally.write(folder, tally.of(len(found), rows, radius_um, limits_um))
    _overlay.write(folder / "overlay.jpg", patches, found, patches.attributes["mpp"])


def _limits(own: Any) -> dict[str, float]:
    """The radii beyond which a detector drops nuclei, from its params."""
    there = {side: name for side, name in tally.LIMITS.items() if hasattr(own, name)}
    return {side: getattr(own, name) for side, name in there.items()}


def _level0(
    patches: stores.PatchStore, rows: np.ndarray, centroid_px: np.ndarray
) -> Float64[np.ndarray, "nuclei 2"]:
    scale = patches.attributes["mpp"] / patches.attributes["slide_mpp"]
    return patches.origin[rows] + centroid_px.astype(np.float64) * scale


if __name__ == "__main__":
    run.start(main)
