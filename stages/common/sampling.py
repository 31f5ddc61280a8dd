"""Positions of patches on a slide, and which of them are cut."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

Values = Float64[np.ndarray, " position"]


@dataclass(frozen=True)
class Grid:
    """All positions: every row at every column, numbered row by row. Level-0 pixels."""

    columns: Int64[np.ndarray, " column"]  # left edges, rising
    rows: Int64[np.ndarray, " row"]  # upper edges, rising
    side: float  # of a patch

    def __len__(self) -> int:
        """How many positions."""
        return len(self.columns) * len(self.rows)

    @property
    def corners(self) -> Int64[np.ndarray, "position 2"]:
        """Top-left corners (x, y)."""
        return np.stack(np.meshgrid(self.columns, self.rows), axis=-1).reshape(-1, 2)

    def middle(self, patch_px: int) -> "Grid":
        """The central crops that embed cuts out of patches of `patch_px`; see `middle_px`."""
        start, crop = (px * self.side / patch_px for px in middle_px(patch_px))
        move = round(start)
        return Grid(self.columns + move, self.rows + move, crop)

    def sums(self, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Values:
        """Sum of the weights of the points within each position; positions may overlap."""
        total = np.zeros((len(self.rows), len(self.columns)))
        for column, within_x in _holders(self.columns, self.side, x):
            for row, within_y in _holders(self.rows, self.side, y):
                both = within_x & within_y
                np.add.at(total, (row[both], column[both]), weights[both])
        return total.reshape(-1)


def _holders(
    starts: Int64[np.ndarray, " start"], side: float, at: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each point the intervals [start, start + side) it may lie in, and whether it does."""
    last = np.searchsorted(starts, at, side="right") - 1
    step = np.diff(starts).min() if len(starts) > 1 else side
    found = []
    for back in range(int(np.ceil(side / max(step, 1))) + 1):
        index = last - back
        found.append((index, (index >= 0) & (at < starts[index] + side)))
    return found


def middle_px(patch_px: int) -> tuple[int, int]:
    """Start and side of a patch's middle: half its side, a pixel more where half has no middle."""
    side = patch_px // 2 + (patch_px - patch_px // 2) % 2
    return (patch_px - side) // 2, side


def grid(extent: tuple[int, int], side_px: int, step_px: int, scale: float) -> Grid:
    """Every position that lies on the slide; none if it is smaller than a patch.

    Args:
        extent: Width and height of the slide, level-0 pixels.
        side_px: Side of a patch, patch pixels.
        step_px: From one position to the next, patch pixels.
        scale: Level-0 pixels per patch pixel.
    """
    columns, rows = (
        np.round(np.arange(0, side / scale - side_px + 1e-6, step_px) * scale).astype(np.int64)
        for side in extent
    )
    return Grid(columns, rows, side_px * scale)


def draw(candidates: Bool[np.ndarray, " position"], count: int, key: str) -> np.ndarray:
    """At most `count` of the candidates at random, in rising order; 0: all of them.

    The draw depends on `key` alone, which names seed and slide, as LESS (github.com/ubc-tea/
    LESS-WSI) draws: not on the order of slides or processes.
    """
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    found = np.flatnonzero(candidates)
    drawn = np.random.default_rng(number).permutation(len(found))
    return found[np.sort(drawn[: count or None])]


def densest(candidates: Bool[np.ndarray, " position"], count: int, area: Values) -> np.ndarray:
    """At most `count` of the candidates, those with the most area, in rising order; 0: all.

    Of equal ones the first is taken.
    """
    found = np.flatnonzero(candidates)
    ranked = found[np.argsort(-area[found], kind="stable")]
    return np.sort(ranked[: count or None])
