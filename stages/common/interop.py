"""Bags of other programs: TRIDENT's and CLAM's h5, CLAM's pt. The only h5py import.

file          what                   shape                    dtype
<slide>.h5    features               [patch, dim]             float32, also [1, patch, dim], float16
              coords                 [patch, 2]               int64, x0, y0 of the patch, level-0 px
<slide>.pt    torch.save of them     [patch, dim]             no coords, no attributes

`coords` carries attributes: patch_size (px as the encoder saw it), patch_size_level0 (px of
level 0), target_magnification and level0_magnification (10 / mpp, not rounded, so that their ratio
is that of the mpp), name; ours adds unit, mpp and slide_mpp, which theirs leave out, and
patch_level 0 and downsample 1, which programs that follow CLAM ask for. TRIDENT's overlap,
level0_width and level0_height are not in a bag and not written. Files are not trusted: nothing is
unpickled but tensors, nothing outside of the file is followed, and sizes are looked at before they
are read.
"""

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from stages.common import run

ENDINGS = (".h5", ".pt")
MOST_BYTES = 4 << 30  # of one slide's features: a bag is held in memory once, as it is in evaluate
BLOCK_BYTES = 64 << 20  # read at a time


@dataclass(frozen=True)
class ForeignBag:
    """One slide's bag, as another program wrote it."""

    features: np.ndarray  # float32 [patch, dim]
    coords: np.ndarray | None  # int64 [patch, 2], level-0 px; None in a pt
    attributes: dict[str, Any] = field(default_factory=dict)  # of coords


def survey(path: Path) -> tuple[int, int]:
    """Look at all of a file in pieces, and tell its patches and their width.

    Raises:
        ValueError: the file is no bag; see `read`.
    """
    with _opened(path) as (features, _, _):
        for _ in _blocks(path, features):
            pass
        return features.shape[-2], features.shape[-1]


def read(path: Path) -> ForeignBag:
    """Read <slide>.h5 or <slide>.pt.

    Raises:
        ValueError: not such a file; `features` missing, empty, not finite, of another shape or
            dtype; `coords` of another length; data that lie outside of the file; beyond 4 GiB.
    """
    with _opened(path) as (features, coords, attributes):
        found = np.empty(features.shape[-2:], np.float32)
        for start, block in _blocks(path, features):
            found[start : start + len(block)] = block
        return ForeignBag(found, coords, attributes)


def write_h5(path: Path, bag: ForeignBag, encoder: str) -> None:
    """Write the layout above, whole or not at all."""
    with run.atomic(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values in (("features", bag.features), ("coords", bag.coords)):
            chunks = (1, values.shape[1]) if len(values) else None
            shape = (None, values.shape[1]) if len(values) else None
            file.create_dataset(name, data=values, chunks=chunks, maxshape=shape)
        file["features"].attrs["encoder"] = encoder
        file["features"].attrs["name"] = bag.attributes["name"]
        for name, value in bag.attributes.items():
            file["coords"].attrs[name] = value


def write_pt(path: Path, features: np.ndarray) -> None:
    """Write the features as a tensor, whole or not at all."""
    with run.atomic(path) as temporary:
        torch.save(torch.from_numpy(np.ascontiguousarray(features)), temporary)


def attributes_of(path: Path) -> dict[str, Any]:
    """What stands at `coords` of an h5 of ours; nothing where the file cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return dict(file["coords"].attrs)
    except (OSError, KeyError):
        return {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, np.ndarray | None, dict[str, Any]]]:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is a link or no file: it must be a file itself; copy it there")
    if path.suffix == ".pt":
        yield _checked(path, _tensor(path)), None, {}
        return
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5: write it again ({error})") from error
    with file, _readable(path):
        features = _checked(path, _dataset(path, file, "features"))
        coords = _dataset(path, file, "coords")
        yield features, _points(path, coords, features.shape[-2]), dict(coords.attrs)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: write it again ({error})") from error


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    if name not in file.keys():  # noqa: SIM118 - `in file` follows links
        raise ValueError(
            f"{path} has no {name}, only {sorted(file) or 'nothing'}: it must have features and "
            "coords, as the files in TRIDENT's features_<encoder> or CLAM's h5_files have"
        )
    inside = isinstance(file.get(name, getlink=True), h5py.HardLink)
    found = file[name] if inside else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(
            f"{path}: {name} is a link, a group or lies in another file: it must be an array in "
            "this file; write it again as one"
        )
    _check_size(path, name, found.shape, found.dtype.itemsize)
    _check_size(path, f"a chunk of {name}", found.chunks or (), found.dtype.itemsize)
    return found


def _check_size(path: Path, name: str, shape: tuple[int, ...], itemsize: int) -> None:
    size = int(np.prod([int(length) for length in shape], dtype=object)) * max(itemsize, 4)
    if size > MOST_BYTES:
        raise ValueError(
            f"{path}: {name} of shape {tuple(shape)} takes {size / 2**30:.1f} GiB: it must be "
            f"{MOST_BYTES >> 30} GiB or less; embed fewer patches of this slide"
        )


def _tensor(path: Path) -> np.ndarray:
    wanted = "it must be one tensor, written by torch.save of torch 1.6 or later"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no zip file: {wanted}")
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(entry.file_size for entry in file.infolist())
        _check_size(path, "its content", (unpacked,), 1) if unpacked > MOST_BYTES else None
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail anywhere inside of torch.load
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} holds more than tensors or is damaged, and was not run: {wanted} ({reason})"
        ) from error
    plain = isinstance(found, torch.Tensor) and found.layout == torch.strided
    if not plain or not found.is_floating_point() or found.device.type != "cpu":
        kind = f"tensor of {found.dtype}" if plain else type(found).__name__
        raise ValueError(f"{path} holds a {kind}: {wanted}, dense and of floating-point numbers")
    _check_size(path, "the tensor", tuple(found.shape), found.element_size())
    return found.detach().float().numpy()


def _checked(path: Path, features: Any) -> Any:
    shape, dtype = features.shape, features.dtype
    flat = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    if not flat or not shape[-1] or dtype.kind != "f":
        raise ValueError(
            f"{path}: features are {dtype} of shape {tuple(shape)}: they must be floating-point "
            "numbers [patch, dim] or [1, patch, dim]"
        )
    if not shape[-2]:
        raise ValueError(f"{path} has no patches: leave this slide out of the cohort")
    return features


def _blocks(path: Path, features: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The features in pieces of whole chunks, as float32, with the row that each begins at."""
    count, dim = features.shape[-2:]
    chunk = (getattr(features, "chunks", None) or (1, 1))[-2]
    rows = max(1, BLOCK_BYTES // (4 * dim) // chunk) * chunk
    for start in range(0, count, rows):
        piece = slice(start, min(start + rows, count))
        block = features[piece] if features.ndim == 2 else features[0, piece]
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
            block = np.asarray(block, np.float32)
        broken = ~np.isfinite(block).all(axis=1)
        if broken.any():
            raise ValueError(
                f"{path}: features of patch {start + broken.argmax()} have NaN or infinity: they "
                "must be finite; embed this slide again"
            )
        yield start, block


def _points(path: Path, coords: h5py.Dataset, count: int) -> np.ndarray:
    shape = coords.shape[1:] if coords.ndim == 3 and coords.shape[0] == 1 else coords.shape
    if shape != (count, 2) or not np.can_cast(coords.dtype, np.int64) or coords.dtype.kind == "b":
        raise ValueError(
            f"{path}: coords are {coords.dtype} of shape {tuple(coords.shape)}: they must be "
            f"integers [{count}, 2], level-0 pixels of each of the {count} patches"
        )
    return coords[:].reshape(count, 2).astype(np.int64)
