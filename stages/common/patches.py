"""Patches of one slide, encoded and decoded one at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from stages.common import jpeg
from stages.common.shards import ShardReader

ZSTD_LEVEL = 3


@dataclass(frozen=True)
class PatchStore:
    """An open store: `store[i]` is patch number i, uint8 [px, px, 3].

    Forked workers may share one. Which arrays there are is said at the head of stores.py.
    """

    path: Path
    count: int
    patch_px: int
    shard_patches: int
    codec: str  # jpeg or zstd
    attributes: dict[str, Any]
    arrays: dict[str, np.ndarray]
    _readers: dict[int, ShardReader] = field(default_factory=dict)

    @property
    def origin(self) -> np.ndarray:
        """Int64 [patch, 2]: level-0 pixels of each patch's top-left corner."""
        return self.arrays["origin"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> np.ndarray:
        """Patch number `at`, uint8 [px, px, 3]."""
        if not 0 <= at < self.count:
            raise IndexError(f"{self.path} has {self.count} patches, no patch {at}")
        shard, row = divmod(at, self.shard_patches)
        data = self._reader(shard)[row]
        if self.codec == "jpeg":
            return jpeg.decode(data)
        shape = (self.patch_px, self.patch_px, 3)
        return np.frombuffer(imagecodecs.zstd_decode(data), np.uint8).reshape(shape)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            path = self.path / "patch" / f"c.{shard}.0.0.0"
            self._readers[shard] = ShardReader(path, self.shard_patches)
        return self._readers[shard]


@dataclass(frozen=True)
class ViewStore(PatchStore):
    """Perturbed patches of one slide and the retained nuclei in each."""

    @property
    def source(self) -> np.ndarray:
        """Int64 [view]: the row of the tile store that each view was made from."""
        return self.arrays["source"]

    def points_of(self, at: int) -> np.ndarray:
        """Float32 [points, 2]: retained nuclei of view `at`, (x, y) in patch pixels."""
        return _points_of(self.arrays, at)

    def seed_of(self, at: int) -> int:
        """No seed: the pixels are shuffled already."""
        return 0


@dataclass(frozen=True)
class Recipe:
    """Views of one slide before their pixels are made: `recipe[i]` is the patch as it was cut.

    `cytossl_core.perturbation.perturb` makes the view's pixels of it, with the view's points and
    seed and `attributes["radius_px"]`; at radius 0 the patch is the view.
    """

    patches: PatchStore
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any]

    @property
    def patch_px(self) -> int:
        """Side of the patches, pixels."""
        return self.patches.patch_px

    @property
    def source(self) -> np.ndarray:
        """Int64 [view]: the row of the tile store that each view is made from."""
        return self.arrays["source"]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, at: int) -> np.ndarray:
        """The patch of view number `at`, uint8 [px, px, 3]."""
        return self.patches[int(self.source[at])]

    def points_of(self, at: int) -> np.ndarray:
        """Float32 [points, 2]: retained nuclei of view `at`, (x, y) in patch pixels."""
        return _points_of(self.arrays, at)

    def seed_of(self, at: int) -> int:
        """Of the shuffle, int64."""
        return int(self.arrays["seed"][at])


def _points_of(arrays: dict[str, np.ndarray], at: int) -> np.ndarray:
    # Points lie in the order of their views.
    begin, end = np.searchsorted(arrays["view_index"], [at, at + 1])
    return arrays["point"][begin:end]


def encoded(patches: Iterable[np.ndarray], codec: str, patch_px: int) -> Iterator[bytes]:
    """Each patch as the bytes of its chunk.

    Raises:
        ValueError: a patch is not uint8 [patch_px, patch_px, 3].
    """
    for patch in patches:
        if patch.shape != (patch_px, patch_px, 3) or patch.dtype != np.uint8:
            raise ValueError(
                f"a patch is {patch.dtype} {patch.shape}: it must be uint8 of {patch_px} px, RGB"
            )
        if codec == "jpeg":
            yield jpeg.encode(np.ascontiguousarray(patch), jpeg.LEVEL)
        else:
            yield imagecodecs.zstd_encode(patch.tobytes(), level=ZSTD_LEVEL)
