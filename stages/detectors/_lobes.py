"""Lobes of one nucleus, found as several: which belong together, and what they are as one."""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.ndimage import find_objects, map_coordinates
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from stages.detectors import Detection, _outlines
from stages.detectors._regions import Labels, Regions

STEPS = 17  # places looked at between two centres
WHOLE = 0.85  # stain between two parts, over the contrast of the lesser: there is no gap at all
BRIDGE, CELL = 0.4, 0.15  # the same of lobes, and the stain around them: both lie in one cell


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of one patch, each of one region or of several."""

    centre: Float64[np.ndarray, "nucleus 2"]  # (x, y), working pixels, continuous
    radius_um: Float64[np.ndarray, " nucleus"]
    quality: Float64[np.ndarray, " nucleus"]  # of the best of its regions
    regions: list[Int64[np.ndarray, " part"]]  # places in the rows of `Regions`


def unite(
    found: Regions,
    kept: Int64[np.ndarray, " kept"],
    quality: Float64[np.ndarray, " region"],
    stain: Float32[np.ndarray, "height width"],
    reach_px: float,
    max_radius_um: float,
) -> Nuclei:
    """Nuclei of the kept regions.

    Two are lobes of one nucleus where their centres are closer than `reach_px`, they are no larger
    together than a nucleus may be, and the stain (above glass) between and around them is a cell's.
    Two small cells side by side on glass have glass around them.
    """
    pairs = KDTree(found.centre[kept]).query_pairs(reach_px, output_type="ndarray")
    first, second = kept[pairs].T
    lobes = pairs[_are_lobes(found, first, second, stain)]
    graph = coo_array((np.ones(len(lobes)), tuple(lobes.T)), shape=(len(kept), len(kept)))
    _, group = connected_components(graph, directed=False)
    area = found.radius_um[kept] ** 2
    too_large = np.bincount(group, area)[group] > max_radius_um**2
    _, group = np.unique(np.where(too_large, -1 - np.arange(len(kept)), group), return_inverse=True)
    total = np.bincount(group, area)
    centre = [np.bincount(group, area * axis) for axis in found.centre[kept].T]
    best = np.zeros(len(total))
    np.maximum.at(best, group, quality[kept])
    parts = np.split(kept[np.argsort(group, kind="stable")], np.cumsum(np.bincount(group))[:-1])
    return Nuclei(
        np.stack(centre, axis=1) / total[:, None], np.sqrt(total), best, parts[: len(total)]
    )


def _are_lobes(
    found: Regions,
    first: Int64[np.ndarray, " pair"],
    second: Int64[np.ndarray, " pair"],
    stain: Float32[np.ndarray, "height width"],
) -> Bool[np.ndarray, " pair"]:
    share = np.linspace(0, 1, STEPS)[:, None, None]
    line = found.centre[first] * (1 - share) + found.centre[second] * share - 0.5  # (x, y)
    at = np.moveaxis(line, 2, 0)[::-1]
    between = map_coordinates(stain, at, order=1, mode="nearest").min(axis=0)
    contrast = np.minimum(found.contrast[first], found.contrast[second])
    around = np.minimum(found.ring[first], found.ring[second])
    in_one_cell = (between >= BRIDGE * contrast) & (around >= CELL * contrast)
    return in_one_cell | (between >= WHOLE * contrast)


def detection(nuclei: Nuclei, labels: Labels, scale: Float64[np.ndarray, " 2"]) -> Detection:
    """The nuclei in pixels of the patch; the outline of several lobes is their convex hull.

    Args:
        nuclei: See `unite`.
        labels: The regions, numbered one higher than their rows.
        scale: Width and height of a working pixel, in pixels of the patch.
    """
    boxes = find_objects(labels)
    rims = []
    for regions in nuclei.regions:
        parts = [_outlines.of(labels[boxes[one]] == one + 1, boxes[one]) for one in regions]
        rim = parts[0] if len(parts) == 1 else cv2.convexHull(np.concatenate(parts))[:, 0]
        rims.append((rim * scale).astype(np.float32))
    return Detection(
        (nuclei.centre * scale).astype(np.float32),
        nuclei.radius_um.astype(np.float32),
        (nuclei.quality / (nuclei.quality + 1)).astype(np.float32),
        rims,
    )
