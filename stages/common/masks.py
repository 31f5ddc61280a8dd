"""Label images and binary masks, read into one point a nucleus."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image, UnidentifiedImageError
from skimage.measure import label

from stages.common.marks import IMAGES, Mark

SUFFIXES = {".png", ".tif", ".tiff"}
MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}  # of Pillow: one channel of whole numbers
MOST_PIECES = 3  # a label has on average; soft edges of a mask fall into many more

Labels = Int64[np.ndarray, "height width"]


def read(files: list[Path], folder: Path) -> tuple[str, list[Mark]]:
    """How the masks were understood, and their marks.

    Each mask belongs to the image of the same name, whatever its suffix. Where no mask holds more
    than one value above 0, they are binary and their connected components are the nuclei; else
    every value above 0 is a nucleus.

    Raises:
        FileNotFoundError: a mask has no image.
        ValueError: a file is no mask.
    """
    images = _by_stem(folder, {file.parent.resolve() for file in files})
    names = [_image_of(file, images, folder) for file in files]
    binary = all(_is_binary(_pixels(file)) for file in files)
    marks: list[Mark] = []
    for file, name in zip(files, names, strict=True):
        pixels = _pixels(file)
        height, width = pixels.shape
        marks.append(Mark(name, extent_px=(width, height)))
        marks += [Mark(name, (x, y)) for x, y in _centres(file, pixels, binary).tolist()]
    return "binary masks, each connected piece a nucleus" if binary else "label images", marks


def _is_binary(pixels: Labels) -> bool:
    above = pixels[pixels != 0]
    return not above.size or int(above.min()) == int(above.max())


def _centres(file: Path, pixels: Labels, binary: bool) -> Float64[np.ndarray, "nuclei 2"]:
    pieces, count = label(pixels, background=0, connectivity=2, return_num=True)
    y, x = np.nonzero(pixels)
    values, which = np.unique((pieces if binary else pixels)[y, x], return_inverse=True)
    if len(values) and values[0] < 0:
        raise ValueError(f"mask {file} holds {values[0]}: labels must be 0 or above")
    if count > MOST_PIECES * len(values):
        raise ValueError(
            f"mask {file} holds {len(values)} values in {count} pieces: a label image has one "
            "value a nucleus, a binary mask one value in all; threshold soft edges or classes"
        )
    area = np.bincount(which)
    return np.stack([np.bincount(which, x) / area, np.bincount(which, y) / area], axis=1) + 0.5


def _by_stem(folder: Path, leave: set[Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES and path.parent.resolve() not in leave:
            found.setdefault(path.stem, []).append(path.name)
    return found


def _image_of(file: Path, images: dict[str, list[str]], folder: Path) -> str:
    names = images.get(file.stem, [])
    if not names:
        raise FileNotFoundError(
            f"mask {file} has no image {file.stem}.* in {folder}: both must have the same name, "
            "and lie in two folders"
        )
    if len(names) > 1:
        raise ValueError(f"mask {file} may belong to {' or '.join(names)}: keep one of them")
    return names[0]


def _pixels(file: Path) -> Labels:
    try:
        with Image.open(file, formats=("PNG", "TIFF")) as image:
            if image.mode not in MODES:
                raise ValueError(
                    f"mask {file} is {image.mode}: it must have one channel of whole numbers"
                )
            return np.asarray(image).astype(np.int64)
    except UnidentifiedImageError:
        raise ValueError(f"mask {file} is neither PNG nor TIFF: export it anew") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"mask {file} is damaged: {error}; export it anew") from None
