"""Artefacts of slides, painted onto drawn ones: what a foreground must not take for cells.

Each painter changes the picture, uint8 [height, width, 3], in place and returns where, as a mask.
"""

from collections.abc import Callable

import cv2
import numpy as np

Mask = np.ndarray
INKS = {"blue": (30, 50, 160), "black": (25, 25, 30), "green": (30, 120, 60), "red": (180, 30, 40)}
BLUR_UM = 5.0


def pen(colour: str) -> Callable[[np.ndarray, float, np.random.Generator], Mask]:
    """A stroke across the slide: streaky, with ragged edges, cells faint below."""

    def paint(image: np.ndarray, mpp: float, rng: np.random.Generator) -> Mask:
        height, width = image.shape[:2]
        line = _wave(rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75), (height, width), rng)
        mask = np.zeros((height, width), np.uint8)
        cv2.polylines(mask, [line], False, 1, round(rng.uniform(120, 180) / mpp))
        ragged = _noise((height, width), 4 / mpp, rng) < 0.6
        core = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=round(6 / mpp))
        mask &= (ragged | (core > 0)).astype(np.uint8)
        streaks = 1 + 0.1 * _noise((height, width), 25 / mpp, rng)
        cover = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.0 / mpp)[..., None]
        ink = np.array(INKS[colour], np.float32) / 255 * streaks[..., None]
        image[:] = np.clip(image * (1 - cover + cover * ink), 0, 255)
        return mask > 0

    return paint


def bubbles(image: np.ndarray, mpp: float, rng: np.random.Generator) -> Mask:
    """Rings, dark outside and bright inside, of some air below the coverslip."""
    touched = np.zeros(image.shape[:2], bool)
    for _ in range(3):
        radius = rng.uniform(30, 140) / mpp
        x, y = rng.uniform(0, 1, 2) * image.shape[1::-1]
        distance = _distance(image.shape[:2], x, y) - radius
        dark = np.exp(-((distance / (rng.uniform(4, 9) / mpp)) ** 2))
        bright = np.exp(-(((distance + 12 / mpp) / (4 / mpp)) ** 2))
        image[:] = np.clip(image * (1 - 0.8 * dark + 0.2 * bright)[..., None], 0, 255)
        touched |= dark > 0.05
    return touched


def coverslip(image: np.ndarray, mpp: float, rng: np.random.Generator) -> Mask:
    """The edge of the coverslip: a dark line with a bright one beside it."""
    height, width = image.shape[:2]
    at, slope = rng.uniform(0.2, 0.8) * width, rng.uniform(-0.08, 0.08)
    y, x = np.indices((height, width), np.float32)
    away = (x - at - slope * y) * mpp
    dark = np.exp(-((away / 6) ** 2)) * (0.85 + 0.1 * _noise((height, width), 30 / mpp, rng))
    bright = np.exp(-(((away - 14) / 5) ** 2))
    image[:] = np.clip(image * (1 - 0.8 * dark + 0.15 * bright)[..., None], 0, 255)
    return np.abs(away) < 12


def dust(image: np.ndarray, mpp: float, rng: np.random.Generator) -> Mask:
    """Black and brown specks of up to some tens of microns, and fibres."""
    cover = np.zeros(image.shape[:2], np.uint8)
    colour = np.zeros(image.shape, np.float32)
    for _ in range(60):
        place = rng.uniform(0, 1, 2) * image.shape[1::-1]
        light = np.array([0.2, 0.16, 0.12]) + rng.uniform(0, 0.15) * np.array([1, 0.7, 0.4])
        if rng.random() < 0.25:
            steps = np.cumsum(rng.normal(0, 12 / mpp, (5, 2)), axis=0) + place
            width = max(1, round(rng.uniform(1, 4) / mpp))
            cv2.polylines(cover, [np.round(steps).astype(np.int32)], False, 1, width)
            cv2.polylines(colour, [np.round(steps).astype(np.int32)], False, light.tolist(), 99)
            continue
        angle = np.sort(rng.uniform(0, 2 * np.pi, 7))
        length = rng.lognormal(1.3, 0.6) / mpp * rng.uniform(0.5, 1.4, 7)
        corners = place + np.stack([np.cos(angle), np.sin(angle)], 1) * length[:, None]
        cv2.fillPoly(cover, [np.round(corners).astype(np.int32)], 1)
        cv2.circle(colour, np.round(place).astype(int).tolist(), 200, light.tolist(), -1)
    soft = cv2.GaussianBlur(cover.astype(np.float32), (0, 0), 0.4 / mpp)[..., None]
    image[:] = np.clip(image * (1 - soft * (1 - colour)), 0, 255)
    return cover > 0


def out_of_focus(image: np.ndarray, mpp: float, rng: np.random.Generator) -> Mask:
    """A third of the slide, far out of focus."""
    height, width = image.shape[:2]
    left = int(rng.uniform(0, 0.6) * width)
    part = slice(left, left + round(0.4 * width))
    soft = cv2.GaussianBlur(image, (0, 0), BLUR_UM / mpp)[:, part].astype(np.float32)
    noise = rng.normal(0, 1.5, soft.shape[:2])[..., None]  # the camera's, which is never blurred
    image[:, part] = np.clip(soft + noise, 0, 255)
    touched = np.zeros((height, width), bool)
    touched[:, part] = True
    return touched


PAINTERS: dict[str, Callable[[np.ndarray, float, np.random.Generator], Mask]] = {
    **{f"pen, {colour}": pen(colour) for colour in INKS},
    "bubbles": bubbles,
    "coverslip": coverslip,
    "dust": dust,
    "out of focus": out_of_focus,
}


def _wave(begin: float, end: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A wavy line from the left to the right, begin and end as shares of the height."""
    height, width = shape
    x = np.linspace(0, width, 30)
    y = np.linspace(begin, end, 30) + 0.05 * np.sin(x / width * rng.uniform(3, 9))
    return np.round(np.stack([x, y * height], axis=1)).astype(np.int32)


def _noise(shape: tuple[int, int], scale_px: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of standard deviation about 1."""
    small = rng.standard_normal([int(side / scale_px) + 3 for side in shape]).astype(np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _distance(shape: tuple[int, int], x: float, y: float) -> np.ndarray:
    rows, columns = np.indices(shape, np.float32)
    return np.hypot(columns - x, rows - y)
