"""Score the detector on annotated images: precision, recall, F1, false alarms per mm2.

    reads   annotations (stages/common/annotations.py) and their images
    writes  data/detect_score/scores.csv    one row an image
            data/detect_score/metrics.json  the set: pooled and macro, 95 % intervals over images
            data/detect_score/gallery.jpg   hits, misses and false alarms

Run it with `python -m stages.detect_score`; it is no stage of dvc.yaml. The detector and its
settings are those of the detect stage, in params.yaml. A nucleus is found when its centroid lies
within the match radius of an annotated one; each is matched once.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from stages.common import annotations, params, plugins, run
from stages.common.annotations import Annotated, Annotations
from stages.common.pictures import write_jpeg
from stages.common.slides import Slide
from stages.detectors import Detector, _gallery, _score, _windows
from stages.detectors._gallery import Scored

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the detector that params.yaml names on the annotations of the command line."""
    asked = _parser().parse_args(arguments)
    if not 0 < asked.radius_um < math.inf:
        raise ValueError(f"--radius-um is {asked.radius_um}: it must be above 0")
    truth = annotations.read(asked.annotations, asked.images, asked.classes)
    _tell(truth, asked)
    name = str(params.section_of("detect").get("detector"))
    plugin = plugins.load("detectors", name)
    detector = plugin.build(params.load(plugin.Params, f"detect.{name}"))
    begun = time.perf_counter()
    scored = list(_score_images(truth.images, asked.mpp, asked.radius_um, detector))
    logger.info("detected in %.1f s by %s", time.perf_counter() - begun, detector.version)
    seed = int(params.section_of("")["seed"])
    summary = _score.summarise([one.counts for one in scored], [_mm2(one) for one in scored], seed)
    write(asked.target, scored, summary, asked.radius_um, f"{name} on {asked.annotations.name}")
    _table(name, scored, summary, asked.radius_um)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages.detect_score",
        description="Score the detector of params.yaml on annotated images.",
        epilog="Coordinates are pixels of the image; the centre of the first pixel is 0.5. CSV: "
        "a row a nucleus, a row with a path alone is an image without nuclei, cls is optional. "
        "Masks: 0 is background, each value a nucleus; where all have one value, each connected "
        "piece. Shares of nothing count as 1, as precision where nothing was found.",
    )
    parser.add_argument(
        "annotations",
        type=Path,
        help="COCO .json; .csv with columns path,x,y or path,x0,y0,x1,y1; a folder of Pascal VOC "
        ".xml; or a folder of label images (.png, .tif) named like the images",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder the paths start from")
    parser.add_argument("--mpp", type=float, required=True, help="microns per pixel of the images")
    parser.add_argument("--radius-um", type=float, default=4.0, help="of a match (%(default)s)")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="keep these only (default: all)"
    )
    parser.add_argument(
        "--target", type=Path, default=Path("data/detect_score"), help="results (%(default)s)"
    )
    return parser


def _tell(truth: Annotations, asked: argparse.Namespace) -> None:
    nuclei = sum(len(image.points) for image in truth.images)
    logger.info(
        "%s: %s; %d images, %d nuclei", asked.annotations, truth.form, len(truth.images), nuclei
    )
    if truth.seen:
        counts = ", ".join(f"{name} {count}" for name, count in list(truth.seen.items())[:20])
        logger.info("classes: %s; kept: %s", counts, ", ".join(asked.classes) or "all")
    if truth.others:
        logger.info("%d other images in %s are not annotated: left out", truth.others, asked.images)


def _score_images(
    images: list[Annotated], mpp: float, radius_um: float, detector: Detector
) -> Iterator[Scored]:
    for image in tqdm(images, desc="detect_score", unit="image"):
        slide = Slide(image.path, mpp)
        extent = slide.width_px, slide.height_px
        _check(image, extent)

        def read(x0: int, y0: int, width: int, height: int, slide: Slide = slide) -> np.ndarray:
            return slide.read(x0, y0, width, height, mpp)

        found = _windows.detect(read, *extent, mpp, detector)
        centroids = found.centroid_px.astype(np.float64)
        pairs = _score.pairs(centroids, image.points, radius_um / mpp)
        yield Scored(image.name, image.path, extent, mpp, found, image.points, pairs)


def _check(image: Annotated, extent: tuple[int, int]) -> None:
    """Refuse annotations that were made for an image of another size."""
    found = " by ".join(map(str, extent))
    if image.extent_px not in (None, extent):
        wanted = " by ".join(map(str, image.extent_px))
        raise ValueError(
            f"{image.path} is {found} px and was annotated at {wanted}: use that image"
        )
    outside = ~((image.points >= 0) & (image.points <= extent)).all(axis=1)
    if outside.any():
        x, y = image.points[outside][0]
        raise ValueError(
            f"{image.path} is {found} px and has {outside.sum()} nuclei outside, one at x {x:g}, y "
            f"{y:g}: coordinates must be pixels of this image, x to the right"
        )


def write(
    target: Path, scored: list[Scored], summary: dict[str, Any], radius_um: float, title: str
) -> None:
    """Write scores.csv, metrics.json and gallery.jpg."""
    target.mkdir(parents=True, exist_ok=True)
    with run.atomic(target / "scores.csv") as temporary:
        pd.DataFrame([_row(one) for one in scored]).to_csv(temporary, index=False)
    counts = sum((one.counts for one in scored), _score.Counts(0, 0, 0))
    totals = {
        "images": len(scored),
        "annotated": counts.annotated,
        "tp": counts.matched,
        "fp": counts.found - counts.matched,
        "fn": counts.annotated - counts.matched,
        "area_mm2": sum(_mm2(one) for one in scored),
        "mpp": scored[0].mpp,
        "radius_um": radius_um,
    }
    run.write_metrics(target / "metrics.json", {**totals, **summary})
    title = (
        f"{title}: pooled F1 {summary['pooled']['f1']['value']:.3f}, match within {radius_um:g} um"
    )
    with run.atomic(target / "gallery.jpg") as temporary:
        write_jpeg(temporary, _gallery.draw(scored, _read, title))


def _read(one: Scored, x0: int, y0: int, width: int, height: int) -> np.ndarray:
    return Slide(one.path, one.mpp).read(x0, y0, width, height, one.mpp)


def _mm2(one: Scored) -> float:
    return math.prod(one.extent_px) * one.mpp**2 / 1e6


def _row(one: Scored) -> dict[str, Any]:
    counts, area_mm2 = one.counts, _mm2(one)
    table = np.array([counts.matched, counts.found, counts.annotated, area_mm2])
    return {
        "image": one.name,
        "tp": counts.matched,
        "fp": counts.found - counts.matched,
        "fn": counts.annotated - counts.matched,
        **dict(zip(_score.RATES, _score.rates(table).round(6).tolist(), strict=True)),
        "area_mm2": area_mm2,
    }


def _table(name: str, scored: list[Scored], summary: dict[str, Any], radius_um: float) -> None:
    logger.info("%s, %d images, match within %g um, 95 %% intervals:", name, len(scored), radius_um)
    logger.info("%-14s %-27s %s", "", "pooled", "mean over images")
    for rate in _score.RATES:
        pooled, macro = (
            "{value:8.3f} ({low:.3f} to {high:.3f})".format(**summary[way][rate])
            for way in ("pooled", "macro")
        )
        logger.info("%-14s %-27s %s", rate, pooled, macro)
    if len(scored) == 1:
        logger.info("one image has no spread: the intervals say nothing")


if __name__ == "__main__":
    run.start(main)
