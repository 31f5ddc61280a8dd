"""How well and how fast the detectors find annotated nuclei: `python -m benchmarks.detection`.

Real images are looked for beside the repository, in ../shared/data; sets that are absent are left
out. None of them states its mpp. Those below are estimates: lbc_nuclei from nuclei of intermediate
cells (radius 4.4 px for 3.5 um), the blood films from red cells (7.5 um wide). Of lbc_nuclei the
files at even places of the sorted list, of bccd every sixth, served to choose the params of
hematoxylin; figures are to be read off the others. What chula_rbc12 shows are red cells, which
have no nuclei: the count per field is of what should not be there (and of the few white cells).
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from stages.common import params, run
from stages.detectors import Detector, _score, cellpose, hematoxylin
from stages.sources import synthetic

logger = logging.getLogger(__name__)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LBC_MPP, BCCD_MPP, CHULA_MPP = 0.8, 0.072, 0.2
LBC_RADIUS_PX, BCCD_RADIUS_PX = 8.0, 80.0  # a match is within it; 80 px are 40 % of a white cell
SYNTHETIC_MPP, SYNTHETIC_PX, SYNTHETIC_RADIUS_UM = 0.5, 128, 4.0
SPEED_PX = 512

Field = tuple[np.ndarray, np.ndarray]  # uint8 RGB, and the (x, y) of its nuclei


def lbc_nuclei(shared: Path, begin: int, step: int = 2) -> Iterator[Field]:
    """Fields of cervical cells; the letterbox around the picture is cut away."""
    folder = shared / "lbc_nuclei_jks43"
    nuclei = pd.read_csv(folder / "objects.csv")
    for file in sorted(folder.glob("images/*"))[begin::step]:
        image = _read(file)
        inner = (image.min(2) < 250) & (image.max(2) > 6)
        rows, columns = (np.flatnonzero(inner.mean(axis) > 0.02) for axis in (1, 0))
        top, left = rows[0] + 3, columns[0] + 3  # a thin frame belongs to the box
        points = nuclei.loc[nuclei.path == f"images/{file.name}", ["x", "y"]].to_numpy(float)
        inside = image[top : rows[-1] - 2, left : columns[-1] - 2]
        yield np.ascontiguousarray(inside), points + 0.5 - [left, top]


def bccd(shared: Path, begin: int, step: int = 6) -> Iterator[Field]:
    """Blood fields and the centres of their white cells."""
    cells = pd.read_csv(shared / "bccd" / "objects.csv")
    cells = cells[cells.cls == "WBC"]
    for file in sorted((shared / "bccd").glob("images/*"))[begin::step]:
        points = cells.loc[cells.path == f"images/{file.name}", ["x", "y"]].to_numpy(float)
        yield _read(file), points


def chula(shared: Path) -> Iterator[Field]:
    """Fields of red cells."""
    for file in sorted((shared / "chula_rbc12").glob("images/*")):
        yield _read(file), np.empty((0, 2))


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
    return cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)


def score(
    detector: Detector, fields: Iterator[Field], mpp: float, radius_px: float
) -> list[_score.Counts]:
    """The outcome of each field."""
    return [
        _score.match(detector(image[None], mpp)[0].centroid_px.astype(float), points, radius_px)
        for image, points in fields
    ]


def macro_f1(counts: list[_score.Counts]) -> float:
    """Mean of the fields' F1."""
    return float(np.mean([one.f1 for one in counts]))


def speed(detector: Detector, image: np.ndarray, mpp: float) -> float:
    """Patches of 512 px per second; the patches are cut from `image`, whatever its scale."""
    steps = [range(0, side - SPEED_PX + 1, SPEED_PX) for side in image.shape[:2]]
    cuts = [(top, left) for top in steps[0] for left in steps[1]]
    patches = np.stack([image[top : top + SPEED_PX, left : left + SPEED_PX] for top, left in cuts])
    detector(patches[:1], mpp)
    begun = time.perf_counter()
    detector(patches, mpp)
    return len(patches) / (time.perf_counter() - begun)


def _report(name: str, counts: list[_score.Counts]) -> None:
    total = sum(counts, _score.Counts(0, 0, 0))
    logger.info(
        "%-28s %4d fields  P %.3f  R %.3f  F1 %.3f  macro F1 %.3f",
        name,
        len(counts),
        total.precision,
        total.recall,
        total.f1,
        macro_f1(counts),
    )


def _sets(detector: Detector, lbc_fields: int | None) -> None:
    settings = params.load(synthetic.Params, "cohort.synthetic")
    radius_px = SYNTHETIC_RADIUS_UM / SYNTHETIC_MPP
    if lbc_fields is None:
        _report("synthetic", score(detector, drawn(settings, 3), SYNTHETIC_MPP, radius_px))
    if (SHARED / "lbc_nuclei_jks43").is_dir():
        for begin, name in ((0, "lbc_nuclei, tuned on"), (1, "lbc_nuclei, held out")):
            fields = list(lbc_nuclei(SHARED, begin))[:lbc_fields]
            _report(name, score(detector, fields, LBC_MPP, LBC_RADIUS_PX))
    if lbc_fields is None and (SHARED / "bccd").is_dir():
        _report("bccd, tuned on", score(detector, bccd(SHARED, 0), BCCD_MPP, BCCD_RADIUS_PX))
        held_out = (field for begin in range(1, 6) for field in bccd(SHARED, begin))
        _report("bccd, held out", score(detector, held_out, BCCD_MPP, BCCD_RADIUS_PX))
    if lbc_fields is None and (SHARED / "chula_rbc12").is_dir():
        found = [one.found for one in score(detector, chula(SHARED), CHULA_MPP, 1.0)]
        logger.info("chula_rbc12: found per field, mean %.2f, most %d", np.mean(found), max(found))


def main() -> None:
    """Score and time every detector that can run."""
    cv2.setNumThreads(1)
    settings = params.load(synthetic.Params, "cohort.synthetic")
    image, _ = synthetic.draw(True, np.random.default_rng(7), settings)
    classical = hematoxylin.build(params.load(hematoxylin.Params, "detect.hematoxylin"))
    logger.info("%s", classical.version)
    for mpp in (0.25, 0.5):
        logger.info("%.0f patches/s at %g mpp, one core", speed(classical, image, mpp), mpp)
    _sets(classical, None)
    own = params.load(cellpose.Params, "detect.cellpose")
    if Path(own.weights).is_file():
        network = cellpose.build(own)
        logger.info("%s, %s", network.version, asdict(own))
        _sets(network, 3)
    else:
        logger.info("cellpose is left out: detect.cellpose.weights is no file (%s)", own.weights)


if __name__ == "__main__":
    run.start(main)
