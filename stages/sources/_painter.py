"""Draws one cytology slide: stained cells, neutrophils and debris, added up as optical density."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from stages.sources import _cells
from stages.sources._cells import RECIPES, Grain
from stages.sources._layout import Spot

STRIPE = 256  # rows turned into light at once
FOLDS = 0.8  # mean per flat cell
SHARP_UM = 0.14  # blur of the optics in focus, a Gaussian's sigma


@dataclass(frozen=True)
class Stain:
    """One slide's colours; optical densities are of red, green, blue, base e."""

    blue_green: Float32[np.ndarray, " 3"]
    pink: Float32[np.ndarray, " 3"]
    nuclear: Float32[np.ndarray, " 3"]
    light: Float32[np.ndarray, " 3"]  # of the empty slide, 0 to 255
    pinkness: float  # share of pink that every cell takes up in addition
    noise: float  # of the camera, grey levels


@dataclass(frozen=True)
class Truth:
    """A nucleus as it was drawn, in level-0 pixels, continuous coordinates."""

    x: float
    y: float
    radius_px: float  # of a circle as large as the nucleus
    kind: str


def draw_stain(spread: float, rng: np.random.Generator) -> Stain:
    """Draw a slide's colours: a laboratory's recipe and its day; `spread` 0 leaves one recipe.

    The densities lie between those measured on the liquid-based Papanicolaou smears of Mendeley
    Data jks43dkjj7 and zddtpgzv63.
    """

    def between(one: tuple[float, ...], other: tuple[float, ...]) -> Float32[np.ndarray, " 3"]:
        share = 0.5 + spread * rng.uniform(-0.5, 0.5)
        mixed = share * np.array(one) + (1 - share) * np.array(other)
        return (mixed * np.exp(spread * 0.1 * rng.standard_normal(3))).astype(np.float32)

    strength = np.exp(spread * 0.25 * rng.standard_normal())
    return Stain(
        blue_green=between((0.62, 0.26, 0.18), (0.44, 0.30, 0.07)) * strength,
        pink=between((0.18, 0.56, 0.38), (0.06, 0.70, 0.10)) * strength,
        nuclear=between((2.0, 1.9, 1.2), (1.5, 2.2, 0.85)) * strength**0.5,
        light=np.clip(245 - 45 * spread * rng.beta(0.8, 2) + spread * rng.normal(0, 4, 3), 0, 252),
        pinkness=spread * rng.beta(0.4, 2.5),
        noise=rng.uniform(0.8, 1.8),
    )


class Sheet:
    """The slide while it is drawn."""

    def __init__(self, width: int, height: int, mpp: float, rng: np.random.Generator):
        self.density = np.zeros((height, width, 3), np.float32)
        self.mpp = mpp
        self.rng = rng
        self.grain: Grain = _cells.grain(mpp, rng)
        self.depth = _smooth(height, width, 250 / mpp, rng)  # regional height of the focus, sd 1

    def window(self, x: float, y: float, reach_um: float) -> tuple[int, tuple[int, int]]:
        """Side and top-left corner (x, y) of a window of `reach_um` around a pixel position."""
        half = int(np.ceil(reach_um / self.mpp)) + 2
        return 2 * half + 1, (int(x) - half, int(y) - half)

    def blur_um(self, x: float, y: float, defocus_um: float) -> float:
        """Blur of a thing at (x, y): the region is out of focus, or the thing lies higher."""
        row, column = _cell_of(self.depth, x / self.density.shape[1], y / self.density.shape[0])
        away = abs(0.7 * self.depth[row, column] + 0.9 * self.rng.standard_normal())
        return float(np.hypot(SHARP_UM, defocus_um * max(0.0, away - 0.7)))

    def add(
        self,
        thickness: Float32[np.ndarray, "side side"],
        colour: Float[np.ndarray, " 3"],
        corner: tuple[int, int],
        blur_um: float,
    ) -> None:
        """Lay a window onto the slide; what reaches over the slide's edge is lost."""
        soft = cv2.GaussianBlur(thickness, (0, 0), max(0.3, blur_um / self.mpp))
        height, width = self.density.shape[:2]
        left, top = max(0, corner[0]), max(0, corner[1])
        right, bottom = min(width, corner[0] + len(soft)), min(height, corner[1] + len(soft))
        if right > left and bottom > top:
            part = soft[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]]
            for channel in range(3):
                self.density[top:bottom, left:right, channel] += part * colour[channel]


def _smooth(
    height: int, width: int, scale: float, rng: np.random.Generator
) -> Float32[np.ndarray, "rows columns"]:
    """Slowly varying noise of standard deviation about 1, one value per `scale` px."""
    shape = (int(height / scale) + 4, int(width / scale) + 4)
    return rng.standard_normal(shape).astype(np.float32)


def _cell_of(field: np.ndarray, x: float, y: float) -> tuple[int, int]:
    return int(y * (field.shape[0] - 1)), int(x * (field.shape[1] - 1))


def paint_cell(sheet: Sheet, spot: Spot, stain: Stain, defocus_um: float) -> Truth:
    """Draw an epithelial cell around its nucleus."""
    rng, recipe, mpp = sheet.rng, RECIPES[spot.kind], sheet.mpp
    long = recipe.angular and rng.random() < 0.08  # rolled up, seen from its side
    stretch = rng.uniform(1.8, 3.0) if long else rng.uniform(1.0, 1.4)
    radius = max(rng.uniform(*recipe.cell_um), 1.25 * spot.nucleus_um) / 2
    x, y = spot.x / mpp, spot.y / mpp
    blur = sheet.blur_um(x, y, defocus_um)
    side, corner = sheet.window(x, y, radius * 1.5 * stretch**0.5 + 4 + 3 * blur)
    centre = np.array([x, y]) - corner
    body = (_cells.angular if recipe.angular else _rounded_body)(radius / mpp, stretch, rng)
    body += centre + rng.uniform(-0.14, 0.14, 2) * radius / mpp
    thickness = rng.uniform(*recipe.thickness) * (1.6 if long else 1)
    oval = rng.uniform(1.0, 1.3)
    outline = _cells.rounded(spot.nucleus_um / 2 / mpp, recipe.ragged, oval, rng) + centre
    film = _cells.cytoplasm(body, side, FOLDS if recipe.angular else 0, sheet.grain, rng)
    film = _cells.halo(film, outline, 0.5 * rng.beta(1, 2), mpp)
    sheet.add(film, thickness * _cytoplasm_colour(recipe.eosin, stain, rng), corner, blur)
    core = _cells.nucleus(outline, side, recipe.clumps, sheet.grain, rng)
    colour = stain.nuclear * rng.uniform(0.94, 1.06, 3) * rng.uniform(*recipe.chromatin)
    sheet.add(core, colour, corner, blur)
    moments = cv2.moments(outline.astype(np.float32))
    area = moments["m00"]
    x, y = corner[0] + moments["m10"] / area, corner[1] + moments["m01"] / area
    return Truth(x, y, float(np.sqrt(area / np.pi)), spot.kind)


def _rounded_body(
    radius: float, stretch: float, rng: np.random.Generator
) -> Float[np.ndarray, "corner 2"]:
    return _cells.rounded(radius, 0.05, stretch, rng)


def _cytoplasm_colour(
    eosin: float, stain: Stain, rng: np.random.Generator
) -> Float32[np.ndarray, " 3"]:
    swapped = rng.random() < 0.12  # cells stain against their kind
    share = (1 - eosin if swapped else eosin) + rng.normal(0, 0.12)
    share = 1 - (1 - np.clip(share, 0, 1)) * (1 - stain.pinkness)
    mixed = share * stain.pink + (1 - share) * stain.blue_green
    return (mixed * rng.uniform(0.9, 1.1, 3)).astype(np.float32)


def paint_neutrophil(sheet: Sheet, spot: Spot, stain: Stain, defocus_um: float) -> Truth:
    """Draw two to four dark lobes in a small pale cell."""
    rng, mpp = sheet.rng, sheet.mpp
    x, y = spot.x / mpp, spot.y / mpp
    blur = sheet.blur_um(x, y, defocus_um)
    side, corner = sheet.window(x, y, 8 + 3 * blur)
    centre = np.array([x, y]) - corner
    lobes = int(rng.integers(2, 5))
    size = spot.nucleus_um / 2 / lobes**0.5 / mpp
    turn = rng.uniform(0, 2 * np.pi) + np.arange(lobes) * 1.25 * np.pi / lobes
    core = np.zeros((side, side), np.float32)
    ring = size * (0.75 + 0.2 * lobes)
    for at in np.stack([np.cos(turn), np.sin(turn)], 1) * ring:
        lobe = _cells.rounded(size * rng.uniform(0.85, 1.15), 0.06, rng.uniform(1, 1.5), rng)
        core = np.maximum(core, _cells.filled(lobe + centre + at, side))
    body = _cells.rounded(rng.uniform(4.4, 5.6) / mpp, 0.09, rng.uniform(1, 1.3), rng)
    film = _cells.filled(body + centre + rng.normal(0, 0.5 / mpp, 2), side)
    film *= 1 + 0.35 * sheet.grain.cut("medium", side, rng)
    pale = 0.8 * stain.blue_green + 0.2 * stain.nuclear
    sheet.add(film, rng.uniform(0.08, 0.4) * pale, corner, blur + 0.25)
    textured = core * (1 + 0.12 * sheet.grain.cut("medium", side, rng))
    sheet.add(textured, rng.uniform(0.65, 0.95) * stain.nuclear, corner, blur)
    rows, columns = np.nonzero(core > 0.5)
    place = corner + np.array([columns.mean(), rows.mean()]) + 0.5
    return Truth(place[0], place[1], float(np.sqrt(core.sum() / np.pi)), "neutrophil")


def exposed(sheet: Sheet, stain: Stain) -> UInt8[np.ndarray, "height width 3"]:
    """Shine light through the slide: uneven lamp, camera noise, 8 bits."""
    height, width = sheet.density.shape[:2]
    rng = sheet.rng
    lamp = 1 + 0.01 * cv2.resize(
        _smooth(height, width, 400 / sheet.mpp, rng), (width, height), interpolation=cv2.INTER_CUBIC
    )
    image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, STRIPE):
        rows = slice(top, top + STRIPE)
        light = cv2.exp(-sheet.density[rows]) * lamp[rows, :, None]
        light *= stain.light
        grey = rng.standard_normal(light.shape[:2], dtype=np.float32)[..., None]
        colour = np.roll(grey, (37, 91), (0, 1)) * np.array([0.5, -0.2, -0.4], np.float32)
        light += stain.noise * (grey + colour)
        image[rows] = np.clip(light, 0, 255)
    return image
