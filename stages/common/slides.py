"""Open a slide and read it at a resolution given in mpp. The only openslide import.

Whole-slide files are read by OpenSlide; plain images (JPEG, PNG, TIFF that is not a pyramid) are
read whole by Pillow and look like a slide of one level.
"""

import math
import warnings
from pathlib import Path

import cv2
import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

# Scanners of nominal 0.25 mpp write 0.2425 to 0.2629; finer than this share is invention.
FINER_SHARE = 0.05
PLAUSIBLE_MPP = (0.02, 40.0)
ANISOTROPY = 0.02  # largest relative difference of mpp along x and y
# Pillow would open the thumbnail page of some of these, and pass it for the slide.
WHOLE_SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"}
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # others may start programs (EPS: Ghostscript)
BITS_PER_SAMPLE = 258  # TIFF tag
Image.MAX_IMAGE_PIXELS = 1 << 29


class Slide:
    """An open slide. Positions are level-0 pixels, sizes are pixels at the mpp asked for.

    Attributes:
        path: The file.
        mpp: Microns per pixel of level 0.
        width_px: Width of level 0.
        height_px: Height of level 0.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        """Open the file; `mpp`, when given, overrides what the file says of itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is empty, damaged, of no known format, or its mpp is not known.
        """
        self.path = path
        self._source = _open(path)
        self.width_px, self.height_px = self._source.level_dimensions[0]
        self.mpp = _checked_mpp(path, mpp if mpp is not None else _mpp_of(self._source, path))

    def read(self, x0: int, y0: int, width_px: int, height_px: int, mpp: float) -> np.ndarray:
        """RGB pixels, uint8 [height_px, width_px, 3], of the region whose top-left is (x0, y0).

        Reads the coarsest level that is not coarser than `mpp` and averages down to it exactly.

        Raises:
            ValueError: the file is damaged at this place.
        """
        scale = mpp / self.mpp
        level = self._source.get_best_level_for_downsample(scale * (1 + 1e-3))
        downsample = self._source.level_downsamples[level]
        width = max(1, round(width_px * scale / downsample))
        height = max(1, round(height_px * scale / downsample))
        try:
            region = self._source.read_region((x0, y0), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            place = f"at ({x0}, {y0}), level {level}"
            raise ValueError(f"slide {self.path.name} is damaged {place}: {error}") from None
        pixels = _opaque(region, self._source.properties.get("openslide.background-color"))
        if (width, height) == (width_px, height_px):
            return pixels
        shrink = cv2.INTER_AREA if width > width_px else cv2.INTER_CUBIC
        return cv2.resize(pixels, (width_px, height_px), interpolation=shrink)

    def thumbnail(self, longest_px: int) -> np.ndarray:
        """The whole slide, uint8 RGB, its longer side at most `longest_px`."""
        scale = max(1.0, max(self.width_px, self.height_px) / longest_px)
        width, height = (max(1, int(side / scale)) for side in (self.width_px, self.height_px))
        return self.read(0, 0, width, height, self.mpp * scale)

    def probe(self) -> None:
        """Read a little at both ends of the file: a truncated slide opens, and fails here.

        Raises:
            ValueError: the file is damaged.
        """
        self.thumbnail(256)
        side = min(256, self.width_px, self.height_px)
        for x0, y0 in ((0, 0), (self.width_px - side, self.height_px - side)):
            self.read(x0, y0, side, side, self.mpp)

    def check_mpp(self, mpp: float) -> None:
        """Refuse a resolution that the slide does not have.

        Raises:
            ValueError: `mpp` is finer than the slide by more than 5 per cent.
        """
        if mpp < self.mpp * (1 - FINER_SHARE):
            raise ValueError(
                f"slide {self.path.name} is {self.mpp:.4g} mpp, and {mpp:g} mpp patches would be "
                f"invented: raise tile.mpp to {math.ceil(self.mpp * 100) / 100:g} or more"
            )


class _Plain:
    """A plain image with the part of OpenSlide's interface that `Slide` uses."""

    level_downsamples = (1.0,)

    def __init__(self, path: Path) -> None:
        self.properties: dict[str, str] = {}
        if path.suffix.lower() in WHOLE_SLIDE_SUFFIXES:
            raise ValueError(
                f"slide {path.name} is damaged, OpenSlide does not know it: copy it again"
            )
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
                "copy it again, convert it to a pyramidal TIFF, or take it out of the cohort"
            ) from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"slide {path.name} is damaged: {error}; copy it again") from None
        self.level_dimensions = (self._image.size,)

    def get_best_level_for_downsample(self, downsample: float) -> int:
        return 0

    def read_region(
        self, location: tuple[int, int], level: int, extent: tuple[int, int]
    ) -> Image.Image:
        (x0, y0), (width, height) = location, extent
        return self._image.crop((x0, y0, x0 + width, y0 + height))


def content_files(path: Path) -> list[Path]:
    """Every file that holds pixels of the slide: MRXS and DICOM slides are folders of files."""
    if path.suffix.lower() == ".mrxs":
        return [path, *sorted(path.with_suffix("").glob("*"))]
    if path.suffix.lower() == ".dcm":
        return sorted(path.parent.glob("*.dcm"))
    return [path]


def entry_file(path: Path) -> Path:
    """The file to open for a path that may be a DICOM folder."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.dcm"))
    if not files:
        raise ValueError(f"slide {path.name} is a folder without .dcm files: name a slide file")
    return files[0]


def _open(path: Path) -> "openslide.OpenSlide | _Plain":
    if not path.is_file():
        raise FileNotFoundError(f"no slide file {path}: restore it, or take it out of the cohort")
    if path.stat().st_size == 0:
        raise ValueError(f"slide {path.name} has 0 bytes: copy it again")
    try:
        vendor = openslide.OpenSlide.detect_format(path)
        return openslide.OpenSlide(path) if vendor else _Plain(path)
    except openslide.OpenSlideError as error:
        raise ValueError(f"slide {path.name} is damaged: {error}; copy it again") from None


def _mpp_of(source: "openslide.OpenSlide | _Plain", path: Path) -> float:
    found = [source.properties.get(name) for name in ("openslide.mpp-x", "openslide.mpp-y")]
    if None in found:
        raise ValueError(
            f"slide {path.name} has no mpp in its metadata: give it in the labels file, column mpp"
        )
    x, y = (float(value) for value in found)
    if abs(x - y) > ANISOTROPY * max(x, y):
        raise ValueError(f"slide {path.name} is {x} by {y} mpp: its pixels must be square")
    return (x + y) / 2


def _checked_mpp(path: Path, mpp: float) -> float:
    low, high = PLAUSIBLE_MPP
    if not low <= mpp <= high:
        raise ValueError(
            f"slide {path.name} is said to be {mpp:g} mpp: it must lie between {low:g} and "
            f"{high:g}; give the right one in the labels file, column mpp"
        )
    return mpp


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith(("I", "F")) or max(tags.get(BITS_PER_SAMPLE, (8,))) > 8:
        raise ValueError(f"slide {path.name} has 16 or 32 bits a channel: convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _opaque(region: Image.Image, background: str | None) -> np.ndarray:
    """RGB of a region; places that were never scanned take the slide's background colour."""
    if region.mode == "RGB":
        return np.asarray(region)
    pixels = np.asarray(region)
    if pixels[..., 3].min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    plain = Image.new("RGBA", region.size, f"#{background}" if background else "white")
    return np.asarray(Image.alpha_composite(plain, region).convert("RGB"))
