"""A picture of hits, misses and false alarms, from the best image to the worst."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon, RegularPolygon
from PIL import Image

from stages.detectors import Detection
from stages.detectors._score import Counts

COLUMNS, TILES = 4, 12
TILE_IN = 4.0  # width of a tile
TALLEST, FLATTEST = 1.5, 0.4  # height to width of a tile; thinner views stand in the middle
VIEW_UM = 240.0  # side of what a tile shows of a larger image
LEAST_PX, MOST_PX = 64, 2048  # of it
DOTS = 100  # per inch
# Told apart by shape too; bright on blue and violet stains alike, for the colour-blind as well.
HIT, MISS, FALSE = "#00a35c", "#ffd400", "#ff2d00"
LABELS = {
    HIT: "hit",
    MISS: "miss: annotated, not found",
    FALSE: "false alarm: found, not annotated",
}


@dataclass(frozen=True)
class Scored:
    """One image's nuclei, and which belong together."""

    name: str
    path: Path
    extent_px: tuple[int, int]  # width, height
    mpp: float
    found: Detection
    annotated: Float[np.ndarray, "annotated 2"]  # (x, y) px
    pairs: np.ndarray  # rows (found, annotated)
    area_mm2: float  # that was searched

    @property
    def counts(self) -> Counts:
        """How many of each."""
        return Counts(len(self.pairs), len(self.found.score), len(self.annotated))


def draw(
    scored: Sequence[Scored], read: Callable[[Scored, int, int, int, int], np.ndarray], title: str
) -> UInt8[np.ndarray, "height width 3"]:
    """The gallery.

    Args:
        scored: Images; of more than fit, a few are shown, two thirds of them with errors.
        read: Gives RGB pixels of a part of an image: x0, y0, width, height.
        title: Stands above the tiles.
    """
    chosen = _chosen(scored)
    views = [_view(one) for one in chosen]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    ratio = max(height / width for _, _, width, height in views)
    tile_in = TILE_IN * min(max(ratio, FLATTEST), TALLEST) + 0.5
    inches = max(columns, 2) * TILE_IN, rows * tile_in + 1.0
    figure = Figure(figsize=inches, dpi=DOTS, layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, one, view in zip(grid, chosen, views, strict=False):
        _tile(axes, one, view, read(one, *view))
    count = f"{len(chosen)} of {len(scored)} images" if len(chosen) < len(scored) else "images"
    heading = f"{title}\n{count} from the best to the worst"
    figure.suptitle(heading, fontsize=13, parse_math=False)
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 12}
    figure.legend(handles=_legend(), **place)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        return np.array(image.convert("RGB"))


def _chosen(scored: Sequence[Scored]) -> list[Scored]:
    """Some with errors, then some of the others, each in equal steps of F1's rank; best first."""
    ranked = sorted(scored, key=lambda one: -one.counts.f1)
    erring = [at for at, one in enumerate(ranked) if one.counts.f1 < 1]
    places = {erring[at] for at in _steps(len(erring), 2 * TILES // 3)}
    others = [at for at in range(len(ranked)) if at not in places]
    places |= {others[at] for at in _steps(len(others), TILES - len(places))}
    return [ranked[place] for place in sorted(places)]


def _steps(length: int, count: int) -> list[int]:
    """`count` places of 0 to `length` - 1, or all, in equal steps from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _legend() -> list[Line2D]:
    looks = zip(LABELS.items(), ("o", "s", "D"), strict=True)
    plain = {"linestyle": "", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2.2}
    return [
        Line2D([], [], color=color, marker=marker, label=label, **plain)
        for (color, label), marker in looks
    ]


def _tile(axes: Axes, one: Scored, view: tuple[int, int, int, int], pixels: np.ndarray) -> None:
    x0, y0, width, height = view
    axes.imshow(
        pixels,
        extent=(x0, x0 + width, y0 + height, y0),
        interpolation="antialiased",
    )
    for color, shapes in _shapes(one).items():
        for edge, line in (("black", 3.2), (color, 1.8)):
            axes.add_collection(
                PatchCollection(shapes, facecolor="none", edgecolor=edge, linewidth=line)
            )
    axes.set(xlim=(x0, x0 + width), ylim=(y0 + height, y0))
    counts = one.counts
    name = one.name if len(one.name) <= 44 else f"...{one.name[-41:]}"
    part = "" if (width, height) == one.extent_px else "   (a part is shown)"
    missed, false = counts.annotated - counts.matched, counts.found - counts.matched
    text = f"hits {counts.matched}, missed {missed}, false {false}, F1 {counts.f1:.2f}{part}"
    axes.set_title(f"{name}\n{text}", fontsize=9, parse_math=False)


def _view(one: Scored) -> tuple[int, int, int, int]:
    """The part to show: of those centred on an error, the one that holds the most errors."""
    extent = np.array(one.extent_px)
    side = np.minimum(extent, min(max(LEAST_PX, round(VIEW_UM / one.mpp)), MOST_PX))
    missed, false = _errors(one)
    points = np.concatenate([one.annotated[missed], one.found.centroid_px[false]])
    points = points if len(points) else np.concatenate([one.annotated, extent[None] / 2])
    corners = np.clip(points[:: 1 + len(points) // 500] - side / 2, 0, extent - side)
    ends = corners + side
    inside = [
        ((points >= low) & (points <= high)).all(axis=1).sum()
        for low, high in zip(corners, ends, strict=True)
    ]
    x0, y0 = corners[int(np.argmax(inside))].round().astype(int).tolist()
    return x0, y0, int(side[0]), int(side[1])


def _errors(one: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Rows of annotated that were missed, and of found that are false."""
    return (
        np.setdiff1d(np.arange(len(one.annotated)), one.pairs[:, 1]),
        np.setdiff1d(np.arange(len(one.found.score)), one.pairs[:, 0]),
    )


def _shapes(one: Scored) -> dict[str, list[Patch]]:
    missed, false = _errors(one)
    typical = float(np.median(one.found.radius_um)) if len(one.found.score) else 4.0
    half = typical / one.mpp * 1.3
    points, radii = one.found.centroid_px, one.found.radius_um / one.mpp * 1.3

    def around(at: int) -> Patch:
        outlines = one.found.outline_px
        return Polygon(outlines[at]) if outlines else Circle(points[at], radii[at])

    return {
        HIT: [around(at) for at in one.pairs[:, 0].tolist()],
        FALSE: [RegularPolygon(points[at], 4, radius=1.4 * radii[at]) for at in false.tolist()],
        MISS: [
            RegularPolygon(one.annotated[at], 4, radius=1.4 * half, orientation=np.pi / 4)
            for at in missed.tolist()
        ],
    }
