"""How well the detectors find annotated nuclei: `python -m benchmarks.detection`.

Every detector that can run, on every set: `--detector NAME` and `--set NAME` run one, `--images N`
the first N of each set. The radius of a match is given in microns, it differs from set to set. The
last column is the pooled F1 when fields are searched as the detect stage sees slides, in patches of
tile.patch_px at tile.mpp, or at the field's own mpp where that is coarser; "-" where no field holds
a patch. How fast detectors are: `python -m benchmarks.detection_speed`.

Real images are looked for beside the repository, in ../shared/data; sets that are absent are left
out. None of them states its mpp. Those below are estimates: lbc_nuclei from nuclei of intermediate
cells (radius 4.4 px for 3.5 um), the blood films from red cells (7.5 um wide). Of lbc_nuclei the
files at even places of the sorted list, of bccd every sixth, served to choose the params of
hematoxylin; the other detectors were chosen on none. What chula_rbc12 shows are red cells, which
have no nuclei: what counts is the false alarms, few white cells among them. Of sipakmed, crops of
one cell each, recall is told alone, see `benchmarks.detection_crops`.
"""

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import detection_crops
from benchmarks.detection_search import Field, score, score_tiled
from stages.common import annotations, params, plugins, run
from stages.common.slides import Slide
from stages.detectors import Detector, _score
from stages.sources import synthetic

logger = logging.getLogger(__name__)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LBC_MPP, BCCD_MPP, CHULA_MPP = 0.8, 0.072, 0.2
LBC_RADIUS_PX, BCCD_RADIUS_PX = 8.0, 80.0  # a match is within it; 80 px are 40 % of a white cell
SYNTHETIC_MPP, SYNTHETIC_PX, SYNTHETIC_RADIUS_UM = 0.5, 128, 4.0
WEIGHTS = {  # where params.yaml names no file
    "instanseg": SHARED / "weights" / "instanseg_brightfield_nuclei" / "instanseg.pt",
    "cellpose": SHARED / "weights" / "cellpose_cyto_scellseg_torch",
}


@dataclass(frozen=True)
class Set:
    """Annotated fields of one scale."""

    mpp: float
    radius_px: float  # of a match
    fields: Callable[[], Iterator[Field]]


def lbc_nuclei(shared: Path, begin: int, step: int = 2) -> Iterator[Field]:
    """Fields of cervical cells; the letterbox around the picture is cut away."""
    folder = shared / "lbc_nuclei_jks43"
    for one in annotations.read(folder / "objects.csv", folder).images[begin::step]:
        image = _read(one.path)
        inner = (image.min(2) < 250) & (image.max(2) > 6)
        rows, columns = (np.flatnonzero(inner.mean(axis) > 0.02) for axis in (1, 0))
        top, left = rows[0] + 3, columns[0] + 3  # a thin frame belongs to the box
        inside = image[top : rows[-1] - 2, left : columns[-1] - 2]
        # The table counts from the centre of the first pixel.
        yield np.ascontiguousarray(inside), one.points + 0.5 - [left, top]


def bccd(shared: Path, begin: int, step: int = 6) -> Iterator[Field]:
    """Blood fields and the centres of their white cells."""
    folder = shared / "bccd"
    for one in annotations.read(folder / "objects.csv", folder, ["WBC"]).images[begin::step]:
        yield _read(one.path), one.points


def chula(shared: Path) -> Iterator[Field]:
    """Fields of red cells: nothing is to be found."""
    folder = shared / "chula_rbc12"
    for one in annotations.read(folder / "objects.csv", folder).images:
        yield _read(one.path), one.points[:0]


def drawn(settings: synthetic.Params, slides: int, seed: int = 7) -> Iterator[Field]:
    """Patches of drawn slides at the resolution of the demo."""
    factor = SYNTHETIC_MPP / settings.mpp
    for number in range(slides):
        image, truth = synthetic.draw(
            number % 2 == 0, np.random.default_rng([seed, number]), settings
        )
        shape = [round(side / factor) for side in image.shape[1::-1]]
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
        points = np.array([(found.x, found.y) for found in truth]).reshape(-1, 2) / factor
        for top in range(0, image.shape[0] - SYNTHETIC_PX + 1, SYNTHETIC_PX):
            for left in range(0, image.shape[1] - SYNTHETIC_PX + 1, SYNTHETIC_PX):
                offset = points - [left, top]
                inside = ((offset >= 0) & (offset < SYNTHETIC_PX)).all(axis=1)
                patch = image[top : top + SYNTHETIC_PX, left : left + SYNTHETIC_PX]
                yield np.ascontiguousarray(patch), offset[inside]


def _read(file: Path) -> np.ndarray:
    slide = Slide(file, 1.0)
    return slide.read(0, 0, slide.width_px, slide.height_px, 1.0)


def macro_f1(counts: list[_score.Counts]) -> float:
    """Mean of the fields' F1."""
    return float(np.mean([one.f1 for one in counts]))


def sets() -> dict[str, Set]:
    """Every set at hand; those that chose params of hematoxylin apart from the others."""
    settings = params.load(synthetic.Params, "cohort.synthetic")
    radius_px = SYNTHETIC_RADIUS_UM / SYNTHETIC_MPP
    found = {"drawn": Set(SYNTHETIC_MPP, radius_px, lambda: drawn(settings, 3))}
    if (SHARED / "lbc_nuclei_jks43").is_dir():
        for begin, name in ((0, "lbc_nuclei-tuned"), (1, "lbc_nuclei-held-out")):
            found[name] = Set(LBC_MPP, LBC_RADIUS_PX, lambda begin=begin: lbc_nuclei(SHARED, begin))
    if (SHARED / "bccd").is_dir():
        found["bccd-tuned"] = Set(BCCD_MPP, BCCD_RADIUS_PX, lambda: bccd(SHARED, 0))
        found["bccd-held-out"] = Set(
            BCCD_MPP,
            BCCD_RADIUS_PX,
            lambda: (field for begin in range(1, 6) for field in bccd(SHARED, begin)),
        )
    if (SHARED / "chula_rbc12").is_dir():
        found["chula_rbc12-no-nuclei"] = Set(CHULA_MPP, 1.0, lambda: chula(SHARED))
    return found


def build(name: str) -> Detector:
    """The detector of this name, its weights from params.yaml or from beside the repository."""
    plugin = plugins.load("detectors", name)
    own: Any = params.load(plugin.Params, f"detect.{name}")
    if name in WEIGHTS and not Path(own.weights).is_file() and WEIGHTS[name].is_file():
        own = replace(own, weights=str(WEIGHTS[name]))
    return plugin.build(own)


def _row(
    detector: str,
    name: str,
    radius_um: float,
    counts: list[_score.Counts],
    tiled: list[_score.Counts],
    area_mm2: list[float],
) -> None:
    summary = _score.summarise(counts, area_mm2, seed=7)
    total = sum(counts, _score.Counts(0, 0, 0))
    ranged = "{value:.3f} ({low:.3f}-{high:.3f})".format
    logger.info(
        "| %s | %s | %.3g | %d | %d | %.3f | %.3f | %s | %s | %.1f | %s |",
        detector,
        name,
        radius_um,
        len(counts),
        total.annotated,
        total.precision,
        total.recall,
        ranged(**summary["pooled"]["f1"]),
        ranged(**summary["macro"]["f1"]),
        summary["pooled"]["false_per_mm2"]["value"],
        f"{sum(tiled, _score.Counts(0, 0, 0)).f1:.3f}" if tiled else "-",
    )


def _score_sets(name: str, detector: Detector, chosen: dict[str, Set], limit: int | None) -> None:
    for title, one in chosen.items():
        fields = list(islice(one.fields(), limit))
        area_mm2 = [image.shape[0] * image.shape[1] * one.mpp**2 / 1e6 for image, _ in fields]
        counts, tiled = (
            way(detector, iter(fields), one.mpp, one.radius_px) for way in (score, score_tiled)
        )
        _row(name, title, one.radius_px * one.mpp, counts, tiled, area_mm2)


def main() -> None:
    """Score what was asked for."""
    cv2.setNumThreads(1)
    known, crops = sets(), detection_crops.sets(SHARED)
    names = sorted([*known, *crops])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection")
    parser.add_argument("--detector", choices=plugins.names("detectors"), help="default: every one")
    parser.add_argument("--set", choices=names, help="default: every one")
    parser.add_argument("--images", type=int, metavar="N", help="the first N of each set")
    asked = parser.parse_args()
    wanted = [asked.set] if asked.set else names
    titles = "detector set match-um images nuclei P R F1 macro-F1 false/mm2 tiled-F1"
    logger.info("| %s |", titles.replace(" ", " | "))
    for name in [asked.detector] if asked.detector else plugins.names("detectors"):
        try:
            detector = build(name)
        except (ImportError, FileNotFoundError, ValueError) as error:
            logger.info("%s is left out: %s", name, error)
            continue
        logger.info("%s: %s", name, detector.version)
        _score_sets(
            name, detector, {key: known[key] for key in known if key in wanted}, asked.images
        )
        for title in [key for key in crops if key in wanted]:
            detection_crops.report(name, detector, title, crops[title][: asked.images])


if __name__ == "__main__":
    run.start(main)
