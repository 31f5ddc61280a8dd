"""Nuclei of an image as the detect stage sees it: in patches at its resolution, side by side."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from stages.common import jpeg
from stages.detectors import Detection
from stages.detectors._windows import Corners, Parts, Read, Run, joined, moved


@dataclass(frozen=True)
class Tiling:
    """How the tile stage cuts slides."""

    mpp: float  # of the patches
    patch_px: int  # their side
    codec: str = "zstd"  # or jpeg: what their pixels went through

    def __post_init__(self) -> None:
        """Refuse what cuts no patches."""
        for name, kinds in (("mpp", int | float), ("patch_px", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < np.inf:
                raise ValueError(f"tile.{name} is {value!r}: it must be a number above 0")

    def corners(self, extent_px: tuple[int, int], mpp: float) -> Corners:
        """Corners of the patches of an image at `mpp`, in its pixels; none where it is smaller.

        Those of the tile stage for patches that do not overlap: what is left over at the right and
        at the bottom is in no patch.
        """
        scale = self.mpp / mpp
        columns, rows = (
            np.round(np.arange(0, side / scale - self.patch_px + 1e-6, self.patch_px) * scale)
            for side in extent_px
        )
        return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2).astype(np.int64)

    def covered(self, extent_px: tuple[int, int], mpp: float) -> tuple[float, float]:
        """Width and height of what is in patches, in pixels of the image."""
        last = self.corners(extent_px, mpp).max(axis=0)
        width, height = (last + self.patch_px * self.mpp / mpp).tolist()
        return min(width, extent_px[0]), min(height, extent_px[1])


def detect(
    read: Read, extent_px: tuple[int, int], mpp: float, tiling: Tiling, run: Run
) -> Detection:
    """The nuclei of an image; pieces of one that edges of patches cut are put together again.

    Args:
        read: Gives RGB pixels of a part of the image, at a resolution that is asked for.
        extent_px: Width and height of the image: a patch or more.
        mpp: Microns per pixel of the image.
        tiling: Resolution and side of the patches.
        run: Finds the nuclei of each of some patches.

    Returns:
        Positions in pixels of the image; no outlines where pieces were put together.
    """
    corners, scale = tiling.corners(extent_px, mpp), tiling.mpp / mpp
    side = (tiling.patch_px, tiling.patch_px)
    seen = _stored(read) if tiling.codec == "jpeg" else read
    found = run(Parts(seen, corners, side, tiling.mpp), tiling.mpp)
    parts = [
        moved(one, corner, scale)
        for one, corner in zip(found, corners.astype(np.float64), strict=True)
    ]
    together, patch = joined(parts)
    return _mended(together, _pieces(together, patch, corners, tiling.patch_px * scale, mpp))


def _stored(read: Read) -> Read:
    """`read`, and then what a patch store makes of it."""

    def through_jpeg(*place: Any) -> np.ndarray:
        return jpeg.decode(jpeg.encode(np.ascontiguousarray(read(*place)), jpeg.LEVEL))

    return through_jpeg


def _pieces(
    found: Detection,
    patch: Int64[np.ndarray, " nuclei"],
    corners: Corners,
    side_px: float,
    mpp: float,
) -> Int64[np.ndarray, "pair 2"]:
    """Pairs of one nucleus: from two patches, both at the edge, their circles overlapping."""
    radius_px = found.radius_um / mpp
    if not len(radius_px):
        return np.empty((0, 2), np.int64)
    offset = found.centroid_px - corners[patch]
    cut = np.minimum(offset, side_px - offset).min(axis=1) <= radius_px
    tree = KDTree(found.centroid_px)
    first, second = tree.query_pairs(2 * radius_px.max(), output_type="ndarray").T
    distance = np.hypot(*(found.centroid_px[first] - found.centroid_px[second]).T)
    one = cut[first] & cut[second] & (patch[first] != patch[second])
    one &= distance < radius_px[first] + radius_px[second]
    return np.stack([first[one], second[one]], axis=1)


def _mended(found: Detection, pairs: Int64[np.ndarray, "pair 2"]) -> Detection:
    """Each group of pieces as one nucleus: of their area, at their centre of mass."""
    if not len(pairs):
        return found
    count = len(found.score)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    groups, group = connected_components(graph, directed=False)
    area = found.radius_um.astype(np.float64) ** 2
    whole = np.bincount(group, area)
    centre: Float64[np.ndarray, "group 2"] = np.stack(
        [np.bincount(group, area * axis) / whole for axis in found.centroid_px.T], axis=1
    )
    score = np.zeros(groups, np.float32)
    np.maximum.at(score, group, found.score)
    return Detection(centre.astype(np.float32), np.sqrt(whole).astype(np.float32), score)
