"""The bags of one encoder: checked where they enter, then read when they are needed."""

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from stages.common import stores

KEPT_BYTES = 2**30  # of one sequence; bags beyond these are read again each time
Bag = Float32[np.ndarray, "instance dim"]


@dataclass(frozen=True)
class Survey:
    """What the bags of an encoder are."""

    dim: int  # numbers of an instance
    digests: dict[str, str]  # SHA-256 of each slide's instances


class StoredBags(Sequence[Bag]):
    """The bags of some slides in order; those that fit into memory are kept there."""

    def __init__(self, folder: Path, slide_ids: Sequence[str], scales: int = 1) -> None:
        self.folder, self.slide_ids, self.scales = folder, slide_ids, scales
        self._kept: dict[int, Bag] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """How many slides."""
        return len(self.slide_ids)

    def __getitem__(self, at: int) -> Bag:
        """The instances of one slide."""
        at = operator.index(at)
        if at in self._kept:
            return self._kept[at]
        bag = read(self.folder, self.slide_ids[at], self.scales)
        if self._bytes + bag.nbytes <= KEPT_BYTES:
            self._kept[at] = bag
            self._bytes += bag.nbytes
        return bag


def read(folder: Path, slide_id: str, scales: int = 1) -> Bag:
    """The instances of one slide.

    Args:
        folder: Holds <slide_id>/bag.zarr, of one encoder.
        slide_id: The slide.
        scales: 1: a patch's embedding; 2: followed by that of its central crop.

    Raises:
        FileNotFoundError: the slide has no bag.
        ValueError: the bag is damaged, or two scales are wanted and it has one.
    """
    path = folder / slide_id / "bag.zarr"
    if not path.is_dir():
        raise FileNotFoundError(
            f"slide {slide_id} has no bag at {path}: run `dvc repro` for the stage embed"
        )
    try:
        bag = stores.open_bag(path)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(
            f"the bag of slide {slide_id} at {path} cannot be read: {error}; delete that folder "
            "and run `dvc repro` for the stage embed"
        ) from None
    if scales == 1:
        return bag.embedding
    if bag.crop is None:
        raise ValueError(
            f"slide {slide_id} has no embeddings of central crops in {path}, which a head of two "
            "scales reads: set embed.central_crop to true"
        )
    return np.concatenate([bag.embedding, bag.crop], axis=1)


def survey(folder: Path, slide_ids: Sequence[str], scales: int = 1) -> Survey:
    """Look at every bag before anything is trained, with one in memory at a time.

    Raises:
        FileNotFoundError: a slide has no bag.
        ValueError: embeddings are absent, not finite, constant or of different widths.
    """
    digests: dict[str, str] = {}
    low = high = None
    for slide_id, bag in _each(folder, slide_ids, scales):
        if low is not None and bag.shape[1] != len(low):
            raise ValueError(
                f"slide {slide_id} has embeddings of {bag.shape[1]} numbers, slide {slide_ids[0]} "
                f"of {len(low)}: they must come from one encoder; rerun the stage embed"
            )
        _check(slide_id, bag)
        low = bag.min(axis=0) if low is None else np.minimum(low, bag.min(axis=0))
        high = bag.max(axis=0) if high is None else np.maximum(high, bag.max(axis=0))
        digests[slide_id] = hashlib.sha256(np.ascontiguousarray(bag)).hexdigest()
    _check_collapse(low, high, f"all embeddings in {folder}")
    return Survey(len(low), digests)


def _each(folder: Path, slide_ids: Sequence[str], scales: int) -> Iterator[tuple[str, Bag]]:
    for slide_id in tqdm(slide_ids, desc="bags", unit="slide", delay=2):
        yield slide_id, read(folder, slide_id, scales)


def _check(slide_id: str, bag: Bag) -> None:
    if len(bag) == 0:
        raise ValueError(
            f"slide {slide_id} has no patches: leave it out of the cohort or loosen tile's choice"
        )
    broken = ~np.isfinite(bag).all(axis=1)
    if broken.any():
        raise ValueError(
            f"slide {slide_id} has NaN or infinity in the embedding of patch {broken.argmax()} "
            f"({broken.sum()} of {len(bag)} patches): they must be finite; retrain or embed again"
        )
    if len(bag) > 1:
        what = f"the {len(bag)} embeddings of slide {slide_id}"
        _check_collapse(bag.min(axis=0), bag.max(axis=0), what)


def _check_collapse(
    low: Float32[np.ndarray, " dim"], high: Float32[np.ndarray, " dim"], what: str
) -> None:
    # Identical inputs pass through different batches with rounding errors of about 1e-7.
    if (high - low).max() <= 1e-6 * max(np.abs(low).max(), np.abs(high).max()):
        raise ValueError(
            f"{what} are equal: they must differ; look at the patches in data/tile, and if those "
            "differ the encoder has collapsed: change pretrain and train again"
        )
