"""Score the detector on annotated images: precision, recall, F1, false alarms per mm2.

    reads   annotations (stages/common/annotations.py) and their images
    writes  data/detect_score/scores.csv    one row an image
            data/detect_score/metrics.json  the set: pooled and macro, 95 % intervals over images
            data/detect_score/gallery.jpg   hits, misses and false alarms

Run it with `python -m stages.detect_score`; it is no stage of dvc.yaml. The detector and its
settings are those of the detect stage, in params.yaml. A nucleus is found when its centroid lies
within the match radius of an annotated one; each is matched once. Images are searched whole, large
ones in overlapping windows; with --as-tiled in patches at tile.mpp, as the detect stage sees them.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.common import annotations, params, plugins, run
from stages.common.annotations import Annotations
from stages.common.pictures import write_jpeg
from stages.common.slides import PLAUSIBLE_MPP, Slide
from stages.detectors import _batches, _gallery, _score, _scoring, _windows
from stages.detectors._gallery import Scored
from stages.detectors._scoring import Search
from stages.detectors._tiles import Tiling

logger = logging.getLogger(__name__)

RADII_UM = (0.01, 50.0)  # of a match; beyond, it is a slip


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the detector that params.yaml names on the annotations of the command line."""
    asked = _parser().parse_args(arguments)
    _check_range("--mpp", asked.mpp, PLAUSIBLE_MPP)
    _check_range("--radius-um", asked.radius_um, RADII_UM)
    truth = annotations.read(asked.annotations, asked.images, asked.classes)
    _tell(truth, asked)
    _check_writable(asked.target)
    detect, tile = params.section_of("detect"), params.section_of("tile")
    tiling = Tiling(tile.get("mpp"), tile.get("patch_px"), str(tile.get("codec")))
    name = str(detect.get("detector"))
    plugin = plugins.load("detectors", name)
    detector = plugin.build(params.load(plugin.Params, f"detect.{name}"))
    search = Search(asked.mpp, asked.radius_um, tiling if asked.as_tiled else None)
    extents = _scoring.survey(truth.images, search)
    batches = _batches.of(detector, _batch(detect.get("batch_patches"), tiling, search))
    begun = time.perf_counter()
    scored = list(_scoring.score(truth.images, extents, search, batches))
    logger.info("detected in %.1f s by %s", time.perf_counter() - begun, detector.version)
    seed = params.load(params.Top).seed
    summary = _score.summarise([one.counts for one in scored], [o.area_mm2 for o in scored], seed)
    write(asked.target, scored, summary, search, f"{name} on {asked.annotations.name}")
    _table(name, scored, summary, search)


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
        ".xml; or a folder of label images or binary masks (.png, .tif) named like the images",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder the paths start from")
    parser.add_argument("--mpp", type=float, required=True, help="microns per pixel of the images")
    parser.add_argument("--radius-um", type=float, default=4.0, help="of a match (%(default)s)")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="keep these only (default: all)"
    )
    parser.add_argument(
        "--as-tiled",
        action="store_true",
        help="search patches of tile.patch_px at tile.mpp, side by side, foreground or not, as the "
        "detect stage sees them. A nucleus cut by an edge between patches counts once, at the "
        "middle of its pieces; what no whole patch covers, right and below, is not scored",
    )
    parser.add_argument(
        "--target", type=Path, default=Path("data/detect_score"), help="results (%(default)s)"
    )
    return parser


def _check_range(name: str, value: float, between: tuple[float, float]) -> None:
    low, high = between
    if not low <= value <= high:
        raise ValueError(f"{name} is {value:g}: it must lie between {low:g} and {high:g}, microns")


def _check_writable(target: Path) -> None:
    """Before hours of work: make the folder, and try."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"--target {target} cannot be written ({why}): name another folder"
        ) from None


def _batch(patches: object, tiling: Tiling, search: Search) -> int:
    """How many at once: patches as the stage, windows so that they have no more pixels."""
    if not isinstance(patches, int) or patches < 1:
        raise ValueError(f"detect.batch_patches is {patches!r}: it must be 1 or more")
    windows = patches * tiling.patch_px**2 // _windows.WINDOW_PX**2
    return patches if search.tiling else max(1, windows)


def _tell(truth: Annotations, asked: argparse.Namespace) -> None:
    nuclei = sum(len(image.points) for image in truth.images)
    logger.info(
        "%s: %s; %d images, %d nuclei", asked.annotations, truth.form, len(truth.images), nuclei
    )
    empty = sum(not len(image.points) for image in truth.images)
    if empty:
        logger.warning(
            "%d of %d images have no annotation and count as free of nuclei, all finds in them as "
            "false alarms: take those that nobody annotated out of the annotations",
            empty,
            len(truth.images),
        )
    if truth.seen:
        counts = ", ".join(f"{name} {count}" for name, count in list(truth.seen.items())[:20])
        logger.info("classes: %s; kept: %s", counts, ", ".join(asked.classes) or "all")
    if truth.others:
        logger.info("%d other images in %s are not annotated: left out", truth.others, asked.images)


def write(
    target: Path, scored: list[Scored], summary: dict[str, Any], search: Search, title: str
) -> None:
    """Write scores.csv, metrics.json and gallery.jpg."""
    with run.atomic(target / "scores.csv") as temporary:
        pd.DataFrame([_row(one) for one in scored]).to_csv(temporary, index=False)
    counts, tiling = sum((one.counts for one in scored), _score.Counts(0, 0, 0)), search.tiling
    totals = {
        "images": len(scored),
        "annotated": counts.annotated,
        **_outcome(counts),
        "area_mm2": sum(one.area_mm2 for one in scored),
        "mpp": scored[0].mpp,
        "radius_um": search.radius_um,
        **({"tile_mpp": tiling.mpp, "patch_px": tiling.patch_px} if tiling else {}),
    }
    run.write_metrics(target / "metrics.json", {**totals, **summary})
    title = (
        f"{title}{', as tiled' if tiling else ''}: pooled F1 "
        f"{summary['pooled']['f1']['value']:.3f}, match within {search.radius_um:g} um"
    )
    with run.atomic(target / "gallery.jpg") as temporary:
        write_jpeg(temporary, _gallery.draw(scored, _read, title))


def _read(one: Scored, x0: int, y0: int, width: int, height: int) -> np.ndarray:
    return Slide(one.path, one.mpp).read(x0, y0, width, height, one.mpp)


def _outcome(counts: _score.Counts) -> dict[str, int]:
    return {
        "tp": counts.matched,
        "fp": counts.found - counts.matched,
        "fn": counts.annotated - counts.matched,
    }


def _row(one: Scored) -> dict[str, Any]:
    counts = one.counts
    table = np.array([counts.matched, counts.found, counts.annotated, one.area_mm2])
    rates = dict(zip(_score.RATES, _score.rates(table).round(6).tolist(), strict=True))
    return {"image": one.name, **_outcome(counts), **rates, "area_mm2": one.area_mm2}


def _table(name: str, scored: list[Scored], summary: dict[str, Any], search: Search) -> None:
    line = "%s%s, %d images, match within %g um, 95 %% intervals:"
    how = ", as tiled" if search.tiling else ""
    logger.info(line, name, how, len(scored), search.radius_um)
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
