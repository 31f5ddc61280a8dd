"""TIFF pyramids with the texture that tells decoders apart."""

from pathlib import Path

import cv2
import numpy as np
import tifffile

APERIO = "Aperio\n|AppMag = 40|MPP = 0.25"


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blurred noise in colour, uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)
    return np.clip(cv2.GaussianBlur(noise, None, 2) * 700 + 150, 0, 255).astype(np.uint8)


def write(
    path: Path,
    extent: tuple[int, int] = (1000, 1400),
    steps: tuple[int, ...] = (1, 4),
    description: str | None = APERIO,
    **options: object,
) -> Path:
    """Write a pyramid of `extent` (height, width); OpenSlide calls it aperio or generic-tiff."""
    base = texture(*extent)
    chosen = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", **options}
    with tifffile.TiffWriter(path) as tiff:
        for step in steps:
            whole = base[: extent[0] // step * step, : extent[1] // step * step]
            level = {"subfiletype": int(step > 1), "metadata": None}
            name = description if step == 1 else None
            tiff.write(whole[::step, ::step], description=name, **level, **chosen)
    return path
