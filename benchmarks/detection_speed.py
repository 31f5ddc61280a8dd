"""How fast the detectors are: `python -m benchmarks.detection_speed [--detector NAME]`.

Patches of 512 px of a drawn slide per second, as the stage runs: a process a core with one thread
each, or one for the one device. A detector whose weights are not at hand gets random ones, of the
released network's shape: that times the network; what it finds, and so the time of what follows, is
not that of true weights. The row says so, and how many nuclei were found.
"""

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import detection
from stages.common import params, plugins, run
from stages.detectors import Detector
from stages.sources import synthetic

logger = logging.getLogger(__name__)

SIDE_PX, SECONDS, BATCH = 512, 8.0, 2
SCALES = 0.25, 0.5  # microns per pixel
LEFT_OUT = ImportError, FileNotFoundError, ValueError


def _cellvit_256(file: Path) -> None:
    import torch

    from stages.detectors import _cellvit_encoders, _cellvit_network

    network = _cellvit_network.CellViT(_cellvit_encoders.RELEASED["ViT256"])
    held = {"arch": "CellViT256", "model_state_dict": network.state_dict(), "config": {}}
    torch.save(held, file)


def _cellpose_sam(file: Path) -> None:
    import torch
    from cellpose.models import CPSAM

    torch.save(CPSAM().state_dict(), file)


RANDOM = {"cellvit": _cellvit_256, "cellpose": _cellpose_sam}


def build(name: str, random: str | None) -> Detector:
    """The detector of this name, from a file of random weights where one is given."""
    if random is None:
        return detection.build(name)
    plugin = plugins.load("detectors", name)
    own: Any = params.load(plugin.Params, f"detect.{name}")
    return plugin.build(replace(own, weights=random))


def measure(name: str, mpp: float, random: str | None) -> tuple[float, float]:
    """Patches per second, and nuclei per patch, of one process."""
    cv2.setNumThreads(1)
    settings = params.load(synthetic.Params, "cohort.synthetic")
    image, _ = synthetic.draw(True, np.random.default_rng(7), settings)
    starts = [range(0, side - SIDE_PX + 1, SIDE_PX) for side in image.shape[:2]]
    patches = np.stack(
        [image[y : y + SIDE_PX, x : x + SIDE_PX] for y in starts[0] for x in starts[1]]
    )
    detector = build(name, random)
    detector(patches[:1], mpp)
    done, nuclei, begun = 0, 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < SECONDS:
        at = done % (len(patches) - BATCH + 1)
        nuclei += sum(len(found.score) for found in detector(patches[at : at + BATCH], mpp))
        done += BATCH
    return done / spent, nuclei / done


def _report(name: str, random: str | None) -> None:
    device = build(name, random).device
    os.environ["OMP_NUM_THREADS"] = "1"
    count = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    for mpp in SCALES:
        with ProcessPoolExecutor(count, get_context("spawn")) as pool:
            found = list(pool.map(measure, [name] * count, [mpp] * count, [random] * count))
        rate, nuclei = sum(one for one, _ in found), np.mean([one for _, one in found])
        row = "%s%s: %.3g patches/s of %d px at %g mpp, %s, %d processes of one thread; %.0f nuclei"
        weights = ", random weights" if random else ""
        logger.info(row, name, weights, rate, SIDE_PX, mpp, device, count, nuclei)


def _time(name: str, folder: Path) -> None:
    try:
        detection.build(name)
    except LEFT_OUT as error:
        if name not in RANDOM:
            raise
        logger.info("%s gets random weights: %s", name, error)
        file = folder / f"{name}.pth"
        RANDOM[name](file)
        _report(name, str(file))
        file.unlink()
    else:
        _report(name, None)


def main() -> None:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection_speed")
    parser.add_argument("--detector", choices=plugins.names("detectors"), help="default: every one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in [asked.detector] if asked.detector else plugins.names("detectors"):
            try:
                _time(name, Path(folder))
            except LEFT_OUT as error:
                logger.info("%s is left out: %s", name, error)


if __name__ == "__main__":
    run.start(main)
