"""Label images and binary masks, read into one point a nucleus; what may be either is refused.

How a folder is read is decided once, over all its masks:

- no mask holds more than one value above 0, and all the same: binary, each connected piece a
  nucleus;
- values are pieces, each in one place and beside the others: label images, each value a nucleus.
  A few may be in several pieces or inside another, where nuclei overlap;
- else the values are classes, soft edges or stray pixels, and an error names a mask that shows it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image, UnidentifiedImageError
from skimage.measure import label

from stages.common.marks import IMAGES, Mark

SUFFIXES = {".png", ".tif", ".tiff"}
MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}  # of Pillow: one channel of whole numbers
WHITE = 255  # what binary masks are written with, and a lone label is not
ODD_SHARE = 0.1  # of labels may be split or inside another; classes and soft edges nearly all are
MOST_FILLED = 0.5  # of a mask, and of its edge, is nuclei: beyond, it is the background

Labels = Int64[np.ndarray, "height width"]


class _Content(NamedTuple):
    """What tells how a mask is meant."""

    file: Path
    values: list[int]  # above 0
    pieces: list[int]  # connected ones of each value
    inside: int  # pieces that touch one other piece and no background


def read(files: list[Path], folder: Path) -> tuple[str, list[Mark]]:
    """How the masks were understood (see above), and their marks.

    Each mask belongs to the image of the same name, whatever its suffix.

    Raises:
        FileNotFoundError: a mask has no image.
        ValueError: a file is no mask, the second of its image, or inverted; or the folder may be
            read in two ways.
    """
    images = _by_stem(folder, {file.parent.resolve() for file in files})
    owners: dict[str, Path] = {}
    for file in files:
        name = _image_of(file, images, folder)
        if owners.setdefault(name, file) != file:
            raise ValueError(f"{owners[name]} and {file.name} are both masks of {name}: keep one")
    binary = _are_binary([_content(file) for file in files])
    marks: list[Mark] = []
    for name, file in owners.items():
        pixels = _pixels(file)
        height, width = pixels.shape
        marks.append(Mark(name, extent_px=(width, height)))
        marks += [Mark(name, (x, y)) for x, y in _centres(pixels, binary).tolist()]
    return "binary masks, each connected piece a nucleus" if binary else "label images", marks


def _content(file: Path) -> _Content:
    pixels = _pixels(file)
    _check_background(file, pixels)
    pieces, count = label(pixels, background=0, connectivity=2, return_num=True)
    first = np.unique(pieces, return_index=True)[1][-count:] if count else []
    values, counts = np.unique(pixels.ravel()[first], return_counts=True)
    if len(values) and values[0] < 0:
        raise ValueError(f"mask {file} holds {values[0]}: values must be 0 or above")
    return _Content(file, values.tolist(), counts.tolist(), _enclosed(pieces))


def _enclosed(pieces: Labels) -> int:
    """How many pieces have one other piece all around."""
    framed = np.pad(pieces, 1)
    beside = [(framed[:, :-1], framed[:, 1:]), (framed[:-1], framed[1:])]
    pairs = [np.stack([a[a != b], b[a != b]], axis=1) for a, b in beside]
    pairs = np.unique(np.concatenate([*pairs, *[pair[:, ::-1] for pair in pairs]]), axis=0)
    neighbours = np.bincount(pairs[:, 0], minlength=1)
    at_background = pairs[pairs[:, 1] == 0, 0]
    return int((np.delete(neighbours, [0, *at_background]) == 1).sum())


def _check_background(file: Path, pixels: Labels) -> None:
    filled = pixels != 0
    edge = np.concatenate([filled[0], filled[-1], filled[:, 0], filled[:, -1]])
    if min(filled.mean(), edge.mean()) > MOST_FILLED:
        raise ValueError(
            f"mask {file} is above 0 in {filled.mean():.0%} of it and {edge.mean():.0%} of its "
            "edge: 0 must be the background; invert it, or set the background to 0"
        )


def _are_binary(masks: Sequence[_Content]) -> bool:
    """True for binary masks, False for label images."""
    single = {mask.values[0]: mask for mask in masks if len(mask.values) == 1}
    several = [mask for mask in masks if len(mask.values) > 1]
    if several and WHITE in single:
        raise _unclear(several[0], f"{single[WHITE].file.name} holds {WHITE} alone")
    labels = sum(len(mask.values) for mask in masks)
    split = sum(count > 1 for mask in masks for count in mask.pieces)
    inside = sum(mask.inside for mask in masks)
    if not several and (len(single) < 2 or split):
        if len(single) > 1:
            first, second, *_ = single.values()
            raise _unclear(first, f"{second.file.name} holds {second.values[0]}")
        return True
    if several and split > ODD_SHARE * labels:
        worst = max(several, key=lambda mask: max(mask.pieces))
        most = int(np.argmax(worst.pieces))
        raise _unclear(worst, f"{worst.values[most]} is in {worst.pieces[most]} pieces")
    if inside > ODD_SHARE * labels:
        worst = max(several, key=lambda mask: mask.inside)
        raise _unclear(worst, "some lie inside others")
    return False


def _unclear(mask: _Content, but: str) -> ValueError:
    count = len(mask.values)
    held = f"{count} values, {mask.values[0]} to {mask.values[-1]}" if count > 1 else mask.values[0]
    return ValueError(
        f"mask {mask.file} holds {held}, and {but}: a label image has a value of its own for each "
        f"nucleus, binary masks are 0 and {WHITE} throughout; threshold soft edges, stray values "
        "and classes"
    )


def _centres(pixels: Labels, binary: bool) -> Float64[np.ndarray, "nuclei 2"]:
    nuclei = label(pixels, background=0, connectivity=2) if binary else pixels
    y, x = np.nonzero(pixels)
    _, which = np.unique(nuclei[y, x], return_inverse=True)
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
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"mask {file} has {image.n_frames} pages: it must have one")
            if image.mode not in MODES:
                raise ValueError(
                    f"mask {file} is {image.mode}: it must have one channel of whole numbers"
                )
            return np.asarray(image).astype(np.int64)
    except UnidentifiedImageError:
        raise ValueError(f"mask {file} is neither PNG nor TIFF: export it anew") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"mask {file} is damaged: {error}; export it anew") from None
