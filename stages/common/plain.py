"""Plain images (JPEG, PNG, TIFF that is no pyramid) as slides of one level, by Pillow."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # others may start programs (EPS: Ghostscript)
BITS_PER_SAMPLE = 258  # TIFF tag
# The whole image is held in memory, 4 bytes a pixel. Pillow refuses twice this number, 2 GiB.
Image.MAX_IMAGE_PIXELS = 1 << 28
PYRAMID = "convert it to a pyramidal TIFF (vips tiffsave IN OUT.tif --tile --pyramid -c jpeg)"


class Plain:
    """A plain image; `stages.readers.Reader` tells what its members mean."""

    level_downsamples = (1.0,)
    mpp = None

    def __init__(self, path: Path) -> None:
        """Read the image.

        Raises:
            ValueError: it is damaged, too large, of 16 bits, or no image.
        """
        try:
            # Pillow warns of damaged EXIF blocks, which are not pixels.
            with (
                warnings.catch_warnings(action="ignore"),
                Image.open(path, formats=FORMATS) as image,
            ):
                self._image = _eight_bit(image, path)
        except UnidentifiedImageError:
            raise ValueError(
                f"slide {path.name} is damaged or of no format that OpenSlide or Pillow reads: "
                f"copy it again, {PYRAMID}, or take it out of the cohort"
            ) from None
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"slide {path.name} is too large a plain image: {error}; {PYRAMID}"
            ) from None
        except (OSError, SyntaxError) as error:
            raise ValueError(f"slide {path.name} is damaged: {error}; copy it again") from None
        self.level_dimensions = (self._image.size,)

    def read(
        self, x0: int, y0: int, level: int, width: int, height: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels of a region; what lies outside of the image is white."""
        pixels = np.asarray(self._image.crop((x0, y0, x0 + width, y0 + height)))
        beyond = x0 + width > self._image.width or y0 + height > self._image.height
        if beyond or min(x0, y0) < 0:
            pixels = pixels.copy()
            columns, rows = np.arange(x0, x0 + width), np.arange(y0, y0 + height)
            pixels[(rows < 0) | (rows >= self._image.height)] = 255
            pixels[:, (columns < 0) | (columns >= self._image.width)] = 255
        return pixels

    def close(self) -> None:
        """Let go of the image."""
        self._image.close()


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS_PER_SAMPLE, (8,)))
    # Pillow drops the low byte of colour PNGs: 12-bit data would be nearly black.
    halved = any(";16" in str(tile.args) for tile in image.tile)
    if image.mode.startswith(("I", "F")) or bits > 8 or halved:
        raise ValueError(f"slide {path.name} has 16 or 32 bits a channel: convert it to 8 bits")
    ImageOps.exif_transpose(image, in_place=True)  # upright, as viewers and annotators show it
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
