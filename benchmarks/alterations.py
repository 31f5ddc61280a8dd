"""Nuclei found in altered images: light, stain, focus, scale: `python -m benchmarks.alterations`.

A table of the macro F1 (mean over fields) per alteration, of one detector (`--detector`, default
hematoxylin) on the annotated sets named (`--set`, may be repeated; default the held-out half of
lbc_nuclei); where nothing is annotated, the false alarms per mm2. `--images N`: the first N fields.
Alterations of density act on -log10(value / 255), so that a factor is a paler or denser stain.
"""

import argparse
import logging
from collections.abc import Callable
from itertools import islice

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from benchmarks import detection
from benchmarks.detection_search import Field, score
from stages.common import plugins, run
from stages.detectors import Detector

logger = logging.getLogger(__name__)

Image = UInt8[np.ndarray, "height width 3"]
Alteration = Callable[[Image, float], Image]  # of an image and its mpp

HUE = 12  # of OpenCV's 180: 24 degrees


def _bytes(image: Float64[np.ndarray, "height width 3"]) -> Image:
    return image.round().clip(0, 255).astype(np.uint8)


def _gain(red: float, green: float, blue: float) -> Alteration:
    return lambda image, mpp: _bytes(image * (red, green, blue))


def _haze(share: float, light: float = 200.0) -> Alteration:
    return lambda image, mpp: _bytes(image * (1 - share) + share * light)


def _density(
    change: Callable[[Float64[np.ndarray, "height width 3"]], np.ndarray],
) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        return _bytes(255 * 10 ** -change(-np.log10(np.maximum(image, 1) / 255.0)))

    return alter


def _hue(turn: int) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + turn) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    return alter


def _saturation(share: float) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(float)
        return _bytes(gray + (image - gray) * share)

    return alter


def _blur(sigma_um: float) -> Alteration:
    return lambda image, mpp: cv2.GaussianBlur(image, (0, 0), sigma_um / mpp)


def _noise(deviation: float) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        return _bytes(image + np.random.default_rng(0).normal(0, deviation, image.shape))

    return alter


def _jpeg(quality: int) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return np.ascontiguousarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)[..., ::-1])

    return alter


def _vignette(loss: float) -> Alteration:
    def alter(image: Image, mpp: float) -> Image:
        rows, columns = (np.linspace(-1, 1, side) ** 2 for side in image.shape[:2])
        return _bytes(image * (1 - loss / 2 * (rows[:, None] + columns))[..., None])

    return alter


ALTERATIONS: dict[str, Alteration] = {
    "none": lambda image, mpp: image,
    "light halved": _gain(0.5, 0.5, 0.5),
    "yellow lamp": _gain(1.0, 0.85, 0.55),
    "blue lamp": _gain(0.7, 0.85, 1.0),
    "haze 0.3": _haze(0.3),
    "haze 0.6": _haze(0.6),
    "stain times 0.5": _density(lambda density: density * 0.5),
    "stain times 0.3": _density(lambda density: density * 0.3),
    "stain times 1.8": _density(lambda density: density * 1.8),
    "hue + 24 degrees": _hue(HUE),
    "hue - 24 degrees": _hue(-HUE),
    "saturation 0.3": _saturation(0.3),
    "gray": _saturation(0.0),
    "red and blue swapped": lambda image, mpp: np.ascontiguousarray(image[..., ::-1]),
    "blur of 1 um": _blur(1.0),
    "noise of 20": _noise(20.0),
    "JPEG of quality 10": _jpeg(10),
    "light lost in corners": _vignette(0.45),
}
SCALES = {"mpp stated 0.8 times": 0.8, "mpp stated 1.25 times": 1.25}


def resized(field: Field, factor: float) -> Field:
    """A field at another scale; its points move along."""
    image, points = field
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    shape = [round(side * factor) for side in image.shape[1::-1]]
    return cv2.resize(image, shape, interpolation=way), points * factor


def figure(
    detector: Detector, fields: list[Field], mpp: float, stated: float, radius_px: float
) -> float:
    """Macro F1 of fields of which a wrong scale may be stated; false per mm2 without nuclei."""
    counts = score(detector, iter(fields), stated, radius_px)
    if any(len(points) for _, points in fields):
        return detection.macro_f1(counts)
    area_mm2 = sum(image.shape[0] * image.shape[1] for image, _ in fields) * mpp**2 / 1e6
    return sum(one.found for one in counts) / area_mm2


def rows(detector: Detector, one: detection.Set, limit: int | None) -> dict[str, float]:
    """The figure of each alteration of a set."""
    fields, mpp, radius = list(islice(one.fields(), limit)), one.mpp, one.radius_px
    found = {}
    for name, alter in ALTERATIONS.items():
        altered = [(alter(image, mpp), points) for image, points in fields]
        found[name] = figure(detector, altered, mpp, mpp, radius)
    for name, factor in SCALES.items():
        found[name] = figure(detector, fields, mpp, factor * mpp, radius)
    for factor in (0.8, 1.5):
        other = [resized(field, factor) for field in fields]
        own = mpp / factor
        found[f"pixels {factor:g} times as many"] = figure(
            detector, other, own, own, radius * factor
        )
    return found


def main() -> None:
    """Print the table of what was asked for."""
    cv2.setNumThreads(1)
    known = detection.sets()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alterations")
    parser.add_argument(
        "--detector", choices=plugins.names("detectors"), default="hematoxylin", metavar="NAME"
    )
    parser.add_argument("--set", choices=sorted(known), action="append", help="may be repeated")
    parser.add_argument("--images", type=int, metavar="N", help="the first N of each set")
    asked = parser.parse_args()
    detector = detection.build(asked.detector)
    chosen = asked.set or ["lbc_nuclei-held-out"]
    if missing := [name for name in chosen if name not in known]:
        raise FileNotFoundError(f"{missing[0]} is not in {detection.SHARED}: name another --set")
    table = {name: rows(detector, known[name], asked.images) for name in chosen}
    logger.info("%s\n| alteration | %s |", detector.version, " | ".join(table))
    for alteration in table[chosen[0]]:
        figures = " | ".join(f"{one[alteration]:.3f}" for one in table.values())
        logger.info("| %s | %s |", alteration, figures)
    for name, one in table.items():
        altered = np.array([value for key, value in one.items() if key != "none"])
        logger.info(
            "%s: mean %.3f, %.3f to %.3f", name, altered.mean(), altered.min(), max(altered)
        )


if __name__ == "__main__":
    run.start(main)
