"""Drawn cervical smears whose truth is known: the demo's cohort, for want of slides that ship."""

import csv
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from jaxtyping import UInt8

from stages.common import cache, perslide
from stages.common.cohort import SlideRow
from stages.common.perslide import Job
from stages.sources import _debris, _painter
from stages.sources._layout import Crowding, spots
from stages.sources._painter import Sheet, Truth

TILE_PX = 256
LEVEL_FACTOR = 4  # between two levels of the pyramid
MAX_PIXELS = 16 * 2**20
OBJECTIVE_AT_1_MPP = 10  # 40x is 0.25 microns per pixel
PREFIX = "syn-"
COHORT_ONLY = ("slides", "positive_share")  # they decide which slides there are, not their looks

RANGES = {  # of Params, both ends allowed
    "slides": (1, 100_000),
    "width_px": (TILE_PX, MAX_PIXELS // TILE_PX),
    "height_px": (TILE_PX, MAX_PIXELS // TILE_PX),
    "mpp": (0.1, 2),
    "positive_share": (0, 1),
    "abnormal_share": (0.001, 1),
    "cells_per_mm2": (1, 2000),
    "neutrophils_per_mm2": (0, 5000),
    "cluster_share": (0, 0.95),
    "empty_share": (0, 0.95),
    "stain_spread": (0, 1.5),
    "defocus_um": (0, 10),
    "jpeg_quality": (1, 100),
}


@dataclass(frozen=True)
class Params:
    """The section `cohort.synthetic`."""

    slides: int  # how many
    width_px: int  # of level 0
    height_px: int
    mpp: float  # microns per pixel of level 0
    positive_share: float  # of the slides, 0 to 1
    abnormal_share: float  # of the epithelial cells of a positive slide, above 0, up to 1
    cells_per_mm2: float  # epithelial cells, mean over slides
    neutrophils_per_mm2: float  # mean over slides
    cluster_share: float  # of the epithelial cells, in groups; 0 to below 1
    empty_share: float  # of the area, without cells; 0 to below 1
    stain_spread: float  # colour differences between slides; 0: none, 1: as between laboratories
    defocus_um: float  # blur of a thing one depth of field away, a Gaussian's sigma
    jpeg_quality: int  # 1 to 100


def build(params: Params, seed: int, target: Path) -> list[SlideRow]:
    """Draw the slides into `target`/slides, each through the cache, with its truth beside it.

    Raises:
        ValueError: a param is out of its range.
    """
    planned = plan(params, seed)
    looks = {key: value for key, value in asdict(params).items() if key not in COHORT_ONLY}
    jobs = [
        Job(slide_id, (label,), {"positive": label == "positive", "seed": seed, "params": params})
        for slide_id, label, _ in planned
    ]
    settings = {**looks, "seed": seed}
    perslide.run("synthetic", _make, jobs, target / "slides", code=(__name__,), settings=settings)
    home = cache.repository().resolve()
    return [
        SlideRow(slide_id, _path(target, slide_id, home), label, patient, "", "", "")
        for slide_id, label, patient in planned
    ]


def _path(target: Path, slide_id: str, home: Path) -> str:
    whole = (target / "slides" / slide_id / "slide.tiff").absolute()
    return str(whole.relative_to(home) if whole.is_relative_to(home) else whole)


def _make(folder: Path, job: Job) -> None:
    make(folder, job.slide_id, **job.arguments)


def plan(params: Params, seed: int) -> list[tuple[str, str, str]]:
    """List the slides as (slide_id, label, patient); a patient has one or two, of one label.

    A longer list begins with the shorter one's slides: adding slides changes none.

    Raises:
        ValueError: a param is out of its range.
    """
    check(params)
    rng = np.random.default_rng(seed)
    planned: list[tuple[str, str, str]] = []
    owed, patient = 0.0, 0
    while len(planned) < params.slides:
        slides = int(rng.integers(1, 3))
        owed += params.positive_share * slides
        positive = owed >= slides / 2
        owed -= slides * positive
        for _ in range(min(slides, params.slides - len(planned))):
            slide_id = f"{PREFIX}{len(planned):03d}"
            planned.append((slide_id, "positive" if positive else "negative", f"p{patient:03d}"))
        patient += 1
    return planned


def check(params: Params) -> None:
    """Check every param against its range.

    Raises:
        ValueError: one lies outside; the message names it and the range.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(params, name)
        if not low <= value <= high:
            raise ValueError(f"cohort.synthetic.{name} is {value}: give {low} to {high}")
    pixels = params.width_px * params.height_px
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"cohort.synthetic draws {params.width_px} x {params.height_px} px, which is "
            f"{pixels / 2**20:.0f} Mpx: make it at most {MAX_PIXELS // 2**20} Mpx"
        )


def make(folder: Path, slide_id: str, positive: bool, seed: int, params: Params) -> None:
    """Draw one slide: slide.tiff and truth.csv in `folder`. Equal arguments give equal bytes."""
    number = int(slide_id.removeprefix(PREFIX))
    image, truth = draw(positive, np.random.default_rng([seed, number]), params)
    write_pyramid(folder / "slide.tiff", image, params.mpp, params.jpeg_quality)
    with (folder / "truth.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("slide_id", "x", "y", "radius_px", "kind"))
        for found in truth:
            x, y, radius, kind = astuple(found)
            writer.writerow((slide_id, f"{x:.2f}", f"{y:.2f}", f"{radius:.2f}", kind))


def draw(
    positive: bool, rng: np.random.Generator, params: Params
) -> tuple[UInt8[np.ndarray, "height width 3"], list[Truth]]:
    """Draw one slide. The label decides on abnormal cells alone; all else is drawn alike."""
    stain = _painter.draw_stain(params.stain_spread, rng)
    share = params.abnormal_share if positive else 0.0
    crowding = Crowding(
        params.cells_per_mm2,
        params.neutrophils_per_mm2,
        params.cluster_share,
        share,
        params.empty_share,
    )
    width, height, mpp = params.width_px, params.height_px, params.mpp
    sheet = Sheet(width, height, mpp, rng)
    _debris.scatter(sheet, stain, params.defocus_um)
    truth = []
    for spot in spots(width * mpp, height * mpp, crowding, rng):
        neutrophil = spot.kind == "neutrophil"
        paint = _painter.paint_neutrophil if neutrophil else _painter.paint_cell
        truth.append(paint(sheet, spot, stain, params.defocus_um))
    return _painter.exposed(sheet, stain), truth


def write_pyramid(
    path: Path, image: UInt8[np.ndarray, "height width 3"], mpp: float, quality: int
) -> None:
    """Write a tiled JPEG pyramid with an Aperio scanner's description, as OpenSlide reads it."""
    height, width = image.shape[:2]
    power = f"{OBJECTIVE_AT_1_MPP / mpp:g}"
    about = f"Aperio Image Library\r\n{width}x{height} synthetic|AppMag = {power}|MPP = {mpp:g}"
    with tifffile.TiffWriter(path) as tiff:
        level, factor = image, 1
        while True:
            tiff.write(
                level,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": quality},
                subfiletype=int(factor > 1),
                description=about,
                resolution=(1e4 / (mpp * factor), 1e4 / (mpp * factor)),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
                maxworkers=1,
            )
            if max(level.shape[:2]) <= TILE_PX:
                break
            factor *= LEVEL_FACTOR
            shape = (max(1, width // factor), max(1, height // factor))
            level = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
