"""What lies between the cells of the drawn slides: specks, bacteria, mucus, clouds, dark clumps."""

import cv2
import numpy as np
from jaxtyping import Float, Float32

from stages.sources import _cells
from stages.sources._painter import FOLDS, Sheet, Stain

PER_MM2 = {"clump": 18, "cloud": 22, "strand": 9, "specks": 15, "ghost": 12}


def scatter(sheet: Sheet, stain: Stain, defocus_um: float) -> None:
    """Scatter debris over the slide; how much of each kind varies from slide to slide."""
    rng = sheet.rng
    height, width = sheet.density.shape[:2]
    area_mm2 = height * width * sheet.mpp**2 / 1e6
    painters = {
        "clump": _clump, "cloud": _cloud, "strand": _strand, "specks": _specks, "ghost": _ghost
    }  # fmt: skip
    for name, painter in painters.items():
        for _ in range(rng.poisson(PER_MM2[name] * area_mm2 * rng.lognormal(-0.2, 0.6))):
            x, y = rng.uniform(0, 1, 2) * (width, height)
            painter(sheet, stain, x, y, sheet.blur_um(x, y, defocus_um))


def _clump(sheet: Sheet, stain: Stain, x: float, y: float, blur: float) -> None:
    """A dark piece, as dark as a nucleus: a bare or shrunken one, dirt, pigment."""
    rng, radius = sheet.rng, sheet.rng.uniform(1.5, 5.0)
    side, corner = sheet.window(x, y, 3 * radius + 3 * blur)
    outline = _cells.rounded(radius / sheet.mpp, 0.16, rng.uniform(1, 2.2), rng)
    shape = _cells.filled(outline + (x - corner[0], y - corner[1]), side)
    shape *= np.maximum(0.2, 1 + 0.35 * sheet.grain.cut("medium", side, rng))
    brown = np.array([0.9, 1.25, 1.6], np.float32)
    share = rng.beta(0.5, 1.2)
    colour = share * brown + (1 - share) * stain.nuclear
    sheet.add(shape, rng.uniform(0.3, 1.1) * colour, corner, blur)


def _cloud(sheet: Sheet, stain: Stain, x: float, y: float, blur: float) -> None:
    """Granular material, as of broken cells."""
    rng, radius = sheet.rng, sheet.rng.uniform(6, 24)
    side, corner = sheet.window(x, y, 3 * radius + 3 * blur)
    outline = _cells.rounded(radius / sheet.mpp, 0.2, rng.uniform(1, 2), rng)
    shape = _cells.filled(outline + (x - corner[0], y - corner[1]), side)
    shape = cv2.GaussianBlur(shape, (0, 0), 0.15 * radius / sheet.mpp)
    grains = np.maximum(0, sheet.grain.cut("medium", side, rng) - 0.3)
    patches = np.maximum(0, sheet.grain.cut("coarse", side, rng) + 0.2)
    colour = _between(stain, rng) * rng.uniform(0.15, 0.5)
    sheet.add(shape * (0.25 + grains) * patches, colour, corner, blur)


def _strand(sheet: Sheet, stain: Stain, x: float, y: float, blur: float) -> None:
    """Mucus: a bundle of pale curved threads."""
    rng, mpp = sheet.rng, sheet.mpp
    side, corner = sheet.window(x, y, 75)
    drawn = np.zeros((side, side), np.float32)
    ends = rng.uniform(0.15, 0.85, (3, 2)) * side
    step = np.linspace(0, 1, 24)[:, None]
    for _ in range(int(rng.integers(1, 6))):
        start, bend, end = ends + rng.normal(0, 5 / mpp, (3, 2))
        curve = (1 - step) ** 2 * start + 2 * step * (1 - step) * bend + step**2 * end
        one = np.zeros((side, side), np.uint8)
        width = max(1, round(rng.uniform(0.4, 2.2) / mpp))
        cv2.polylines(one, [np.round(curve * 16).astype(np.int32)], False, 255, width, 16, 4)
        drawn += one * np.float32(rng.uniform(0.2, 1) / 255)
    drawn *= np.clip(0.6 + 0.5 * sheet.grain.cut("coarse", side, rng), 0, None)
    colour = _between(stain, rng) * rng.uniform(0.1, 0.35)
    sheet.add(drawn, colour, corner, blur + rng.uniform(0.2, 0.8))


def _specks(sheet: Sheet, stain: Stain, x: float, y: float, blur: float) -> None:
    """Bacteria and dust: tiny dots and rods strewn over some tens of microns."""
    rng, mpp = sheet.rng, sheet.mpp
    spread = rng.uniform(4, 22)
    side, corner = sheet.window(x, y, 3.5 * spread + 3 * blur)
    drawn = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(3, 60))):
        start = side / 2 + rng.normal(0, spread / mpp, 2)
        ends = np.stack([start, start + rng.normal(0, 0.5 / mpp, 2)])
        tone, width = int(rng.uniform(90, 255)), max(1, round(rng.uniform(0.3, 0.8) / mpp))
        cv2.polylines(drawn, [np.round(ends * 16).astype(np.int32)], False, tone, width, 16, 4)
    colour = stain.nuclear * rng.uniform(0.3, 0.9)
    sheet.add(drawn * np.float32(1 / 255), colour, corner, blur)


def _ghost(sheet: Sheet, stain: Stain, x: float, y: float, blur: float) -> None:
    """A squame that has lost its nucleus."""
    rng, radius = sheet.rng, sheet.rng.uniform(14, 26)
    side, corner = sheet.window(x, y, 1.8 * radius + 4 + 3 * blur)
    outline = _cells.angular(radius / sheet.mpp, rng.uniform(1, 1.5), rng)
    film = _cells.cytoplasm(outline + (x - corner[0], y - corner[1]), side, FOLDS, sheet.grain, rng)
    sheet.add(film, _between(stain, rng) * rng.uniform(0.15, 0.5), corner, blur)


def _between(stain: Stain, rng: np.random.Generator) -> Float32[np.ndarray, " 3"]:
    share: Float[np.ndarray, ""] | float = rng.beta(0.7, 0.9)
    return share * stain.pink + (1 - share) * stain.blue_green
