"""Single cells of the drawn slides: the optical thickness of cytoplasm and nucleus in a window."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32
from scipy import fft

EDGE_UM = 0.35  # fall-off of the thickened rim of a cell and of a nuclear membrane
SUBPIXEL_BITS = 4  # fixed-point digits of OpenCV's polygon corners


@dataclass(frozen=True)
class Recipe:
    """How one kind of cell looks; ranges are drawn from evenly."""

    cell_um: tuple[float, float]  # diameter of the cell
    nucleus_um: tuple[float, float]  # diameter of the nucleus
    angular: bool  # a flat polygon, folded and creased; or rounded
    thickness: tuple[float, float]  # of the cytoplasm, times the stain's optical density
    chromatin: tuple[float, float]  # of the nucleus, times the stain's optical density
    clumps: float  # contrast of the chromatin; 0: even
    ragged: float  # waviness of the nuclear outline, share of its radius
    eosin: float  # mean share of the pink stain in the cytoplasm; the rest is blue-green


RECIPES = {
    "superficial": Recipe((42, 60), (5.6, 7.0), True, (0.4, 0.95), (0.6, 0.9), 0.1, 0.05, 0.85),
    "intermediate": Recipe((36, 52), (7.6, 9.0), True, (0.4, 1.1), (0.36, 0.64), 0.24, 0.05, 0.08),
    "parabasal": Recipe((16, 25), (8.6, 10.2), False, (0.8, 1.5), (0.38, 0.66), 0.2, 0.03, 0.05),
    "abnormal": Recipe((17, 29), (11.5, 16), False, (0.8, 1.6), (0.6, 0.92), 0.36, 0.12, 0.25),
}


@dataclass(frozen=True)
class Grain:
    """Noise of mean 0 and variance 1 at four scales, cut into at random places."""

    bands: dict[str, Float32[np.ndarray, "side side"]]
    mpp: float  # microns per pixel

    def cut(self, band: str, side: int, rng: np.random.Generator) -> Float32[np.ndarray, "a a"]:
        """A random square of `side` px."""
        field = self.bands[band]
        top, left = rng.integers(0, len(field) - side + 1, 2)
        return field[top : top + side, left : left + side]


def grain(mpp: float, rng: np.random.Generator) -> Grain:
    """Draw the noise for one slide."""
    side = fft.next_fast_len(max(512, round(260 / mpp)))
    frequency = np.hypot(fft.fftfreq(side)[:, None], fft.rfftfreq(side)[None]).astype(np.float32)
    bands = {}
    for band, sigma_um in {"fine": 0.25, "medium": 0.7, "coarse": 2.2, "broad": 9.0}.items():
        white = fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
        smooth = white * np.exp(-2 * (np.pi * frequency * sigma_um / mpp) ** 2)
        smooth[0, 0] = 0
        field = fft.irfft2(smooth, (side, side))
        bands[band] = (field / field.std()).astype(np.float32)
    return Grain(bands, mpp)


def rounded(
    radius: float, ragged: float, stretch: float, rng: np.random.Generator
) -> Float[np.ndarray, "corner 2"]:
    """A closed wavy oval around (0, 0), in the unit of `radius`."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    wave = np.arange(2, 8)
    height = ragged * rng.standard_normal(6) / wave**0.8
    phase = rng.uniform(0, 2 * np.pi, 6)
    length = radius * (1 + height @ np.cos(wave[:, None] * angle + phase[:, None]))
    return _turned(np.stack([length * np.cos(angle), length * np.sin(angle)], 1), stretch, rng)


def angular(
    radius: float, stretch: float, rng: np.random.Generator
) -> Float[np.ndarray, "corner 2"]:
    """A closed polygon with worn corners and edges around (0, 0), in the unit of `radius`."""
    count = rng.integers(5, 10)
    angle = (np.arange(count) + rng.uniform(-0.36, 0.36, count)) * 2 * np.pi / count
    length = radius * rng.uniform(0.76, 1.16, count)
    points = np.stack([length * np.cos(angle), length * np.sin(angle)], 1)
    points = _corners_cut(points, rng.uniform(0.08, 0.28))
    for wear in (0.03, 0.012, 0.006):
        points = _corners_cut(points, 0.25) + rng.normal(0, wear * radius, (2 * len(points), 2))
    return _turned(_corners_cut(points, 0.25), stretch, rng)


def _corners_cut(
    points: Float[np.ndarray, "corner 2"], share: float
) -> Float[np.ndarray, "more 2"]:
    following = np.roll(points, -1, 0)
    ends = (points + share * (following - points), following - share * (following - points))
    return np.stack(ends, 1).reshape(-1, 2)


def _turned(
    points: Float[np.ndarray, "corner 2"], stretch: float, rng: np.random.Generator
) -> Float[np.ndarray, "corner 2"]:
    turn = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    return points * (stretch**0.5, stretch**-0.5) @ np.array([[cos, sin], [-sin, cos]])


def filled(outline: Float[np.ndarray, "corner 2"], side: int) -> Float32[np.ndarray, "side side"]:
    """1 within the outline, 0 outside; corners in continuous window pixels."""
    mask = np.zeros((side, side), np.uint8)
    corners = np.round((outline - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return mask.astype(np.float32) / 255


def cytoplasm(
    outline: Float[np.ndarray, "corner 2"],
    side: int,
    folds: float,
    grain: Grain,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "side side"]:
    """Translucent, thinner towards the edge, folded, creased and granular; about 1 inside."""
    layers = filled(outline, side)
    for _ in range(min(3, rng.poisson(folds))):
        outline, flap = _folded(outline, side, rng)
        layers = layers * filled(outline, side) + flap
    inside = (layers > 0.5).view(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3) * np.float32(grain.mpp)
    body = rng.uniform(0.5, 0.9)
    body = body + (1 - body) * (1 - np.exp(-depth / rng.uniform(3, 10)))
    relief = 1 + rng.uniform(0.2, 0.45) * grain.cut("broad", side, rng)
    relief += _granules(side, grain, rng) + _rim(depth, grain, rng)
    relief += _wrinkles(side, grain, rng)
    if folds:
        relief += _creases(outline, side, grain.mpp, rng)
    return _warped(layers * body * np.maximum(relief, 0.2), grain, rng)


def _warped(
    film: Float32[np.ndarray, "side side"], grain: Grain, rng: np.random.Generator
) -> Float32[np.ndarray, "side side"]:
    """Bend everything a little: no edge, fold or crease of a cell is straight."""
    axis = np.arange(len(film), dtype=np.float32)
    bend = [
        (1.1 * grain.cut("broad", len(film), rng) + 0.22 * grain.cut("coarse", len(film), rng))
        / np.float32(grain.mpp)
        for _ in range(2)
    ]
    return cv2.remap(film, bend[0] + axis, bend[1] + axis[:, None], cv2.INTER_LINEAR)


def _folded(
    outline: Float[np.ndarray, "corner 2"], side: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "corner 2"], Float32[np.ndarray, "side side"]]:
    """Fold one edge over: the outline cut at a chord, and what lay beyond it, laid back."""
    turn = rng.uniform(0, 2 * np.pi)
    normal = np.array([np.cos(turn), np.sin(turn)])
    along = outline @ normal
    reach = (along.max() - along.mean()) * rng.uniform(0.08, 0.5)
    beyond = np.maximum(along - (along.max() - reach), 0)[:, None] * normal
    return outline - beyond, filled((outline - 2 * beyond)[beyond.any(1)], side)


def halo(
    film: Float32[np.ndarray, "side side"],
    core: Float[np.ndarray, "corner 2"],
    strength: float,
    mpp: float,
) -> Float32[np.ndarray, "side side"]:
    """Thin the cytoplasm in a narrow ring around the nucleus."""
    middle = core.mean(0)
    ring = filled(middle + 1.3 * (core - middle), len(film))
    return film * (1 - strength * cv2.GaussianBlur(ring, (0, 0), 0.7 / mpp))


def _rim(
    depth: Float32[np.ndarray, "side side"], grain: Grain, rng: np.random.Generator
) -> Float32[np.ndarray, "side side"]:
    """A thin thickened edge, and stretches of edge that curl up broadly."""
    thin = rng.uniform(0.05, 0.5) * np.exp(-depth / EDGE_UM)
    curled = np.clip(grain.cut("broad", len(depth), rng) - rng.uniform(-0.3, 0.8), 0, 1.5)
    return thin + rng.uniform(0.3, 1.8) * curled * np.exp(-depth / rng.uniform(0.5, 2.5))


def _granules(
    side: int, grain: Grain, rng: np.random.Generator
) -> Float32[np.ndarray, "side side"]:
    """Fine and coarse unevenness, and in some cells dark granules."""
    strong = rng.beta(1.0, 2.5)  # few cells are very granular
    medium = grain.cut("medium", side, rng)
    uneven = (0.03 + 0.2 * strong) * medium + rng.uniform(0.04, 0.13) * grain.cut(
        "coarse", side, rng
    )
    uneven += (0.03 + 0.1 * strong) * grain.cut("fine", side, rng)
    if rng.random() < 0.2:
        patch = np.clip(grain.cut("broad", side, rng), 0, 1)
        uneven += 2.0 * patch * np.clip(medium - 1.9, 0, 0.7)
    return uneven


def _creases(
    outline: Float[np.ndarray, "corner 2"], side: int, mpp: float, rng: np.random.Generator
) -> Float32[np.ndarray, "side side"]:
    """A few thin dark curves from the edge inwards, where the sheet is creased."""
    drawn = np.zeros((side, side), np.uint8)
    middle, step = outline.mean(0), np.linspace(0, 1, 12)[:, None]
    for _ in range(rng.poisson(3.0)):
        start = outline[rng.integers(len(outline))]
        end = middle + (start - middle) * rng.uniform(-0.7, 0.6)
        end = end + rng.normal(0, 5 / mpp, 2)
        bend = (start + end) / 2 + rng.normal(0, 4 / mpp, 2)
        curve = (1 - step) ** 2 * start + 2 * step * (1 - step) * bend + step**2 * end
        width = max(1, round(rng.uniform(0.3, 1.6) / mpp))
        points = np.round(curve * 2**SUBPIXEL_BITS).astype(np.int32)
        tone = int(rng.uniform(60, 255))
        cv2.polylines(drawn, [points], False, tone, width, cv2.LINE_AA, SUBPIXEL_BITS)
    soft = cv2.GaussianBlur(drawn.astype(np.float32), (0, 0), max(0.5, 0.4 / mpp))
    return soft * np.float32(0.9 / 255)


def _wrinkles(
    side: int, grain: Grain, rng: np.random.Generator
) -> Float32[np.ndarray, "side side"]:
    """Faint lines along the zero crossings of stretched noise, in patches."""
    turn, scale = rng.uniform(0, 180), rng.uniform(0.35, 0.7)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), turn, 1)
    matrix[:, 0] *= scale
    field = grain.cut("coarse", side, rng)
    field = cv2.warpAffine(field, matrix, (side, side), borderMode=cv2.BORDER_REFLECT)
    patch = np.clip(grain.cut("broad", side, rng), 0, 1)
    return rng.uniform(0.15, 0.6) * patch * np.exp(-((field / 0.16) ** 2))


def nucleus(
    outline: Float[np.ndarray, "corner 2"],
    side: int,
    clumps: float,
    grain: Grain,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "side side"]:
    """Chromatin within a darker membrane; about 1 inside."""
    mask = filled(outline, side)
    depth = cv2.distanceTransform((mask > 0.5).view(np.uint8), cv2.DIST_L2, 3) * grain.mpp
    membrane = (0.1 + 0.6 * clumps) * np.exp(-depth / EDGE_UM)
    coarse = np.clip(grain.cut("medium", side, rng), -1.2, 1.8)
    texture = clumps * (0.75 * coarse + 0.35 * grain.cut("fine", side, rng))
    shade = 0.06 * grain.cut("coarse", side, rng)
    return mask * np.maximum(1 + membrane + texture + shade, 0.25)
