"""Annotated images searched for nuclei, whole or as the detect stage sees them, and matched."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from tqdm import tqdm

from stages.common.annotations import Annotated
from stages.common.slides import Slide
from stages.detectors import Detection, _score, _tiles, _windows
from stages.detectors._gallery import Scored
from stages.detectors._tiles import Tiling

Extent = tuple[int, int]  # width, height, px


@dataclass(frozen=True)
class Search:
    """How images are searched."""

    mpp: float  # of the images
    radius_um: float  # of a match
    tiling: Tiling | None  # patches as the detect stage sees them; None: whole, or in windows

    def corners(self, extent: Extent) -> _windows.Corners:
        """Of the patches or windows of an image."""
        if self.tiling:
            return self.tiling.corners(extent, self.mpp)
        return _windows.windows(extent, self.mpp)[0]

    def nuclei(self, slide: Slide, extent: Extent, run: _windows.Run) -> Detection:
        """Found in an image; positions in its pixels."""
        if self.tiling:
            return _tiles.detect(slide.read, extent, self.mpp, self.tiling, run)
        return _windows.detect(slide.read, extent, self.mpp, run)

    def searched(self, extent: Extent) -> tuple[float, float]:
        """Width and height of what is searched, from the top left."""
        return self.tiling.covered(extent, self.mpp) if self.tiling else extent


def survey(images: list[Annotated], search: Search) -> list[Extent]:
    """The extent of each image.

    Raises:
        ValueError: an image is damaged, its annotations are of another size, or it is smaller or
            coarser than a patch.
    """
    bar = tqdm(images, desc="detect_score: looking at the images", unit="image")
    return [_opened(image, search)[1] for image in bar]


def score(
    images: list[Annotated], extents: list[Extent], search: Search, run: _windows.Run
) -> Iterator[Scored]:
    """Search each image and match what is found; the bar counts patches or windows."""
    total = sum(len(search.corners(extent)) for extent in extents)
    with tqdm(total=total, desc="detect_score", unit="patch") as bar:

        def counted(patches: Sequence[np.ndarray], mpp: float) -> Iterator[Detection]:
            for found in run(patches, mpp):
                bar.update()
                yield found

        for image in images:
            slide, extent = _opened(image, search)
            yield _matched(image, extent, search, search.nuclei(slide, extent, counted))


def _opened(image: Annotated, search: Search) -> tuple[Slide, Extent]:
    slide, tiling = Slide(image.path, search.mpp), search.tiling
    extent = slide.width_px, slide.height_px
    _check(image, extent)
    if tiling:
        slide.check_mpp(tiling.mpp)
        if not len(search.corners(extent)):
            width, height = (int(side * search.mpp / tiling.mpp) for side in extent)
            raise ValueError(
                f"{image.path} is {width} by {height} px at {tiling.mpp:g} mpp, smaller than a "
                f"patch: lower tile.patch_px ({tiling.patch_px}), or score without --as-tiled"
            )
    return slide, extent


def _check(image: Annotated, extent: Extent) -> None:
    """Refuse annotations that were made for an image of another size."""
    found = " by ".join(map(str, extent))
    if image.extent_px not in (None, extent):
        wanted = " by ".join(map(str, image.extent_px))
        raise ValueError(
            f"{image.path} is {found} px and was annotated at {wanted}: use that image"
        )
    outside = ~((image.points >= 0) & (image.points <= extent)).all(axis=1)
    if outside.any():
        x, y = image.points[outside][0]
        raise ValueError(
            f"{image.path} is {found} px and has {outside.sum()} nuclei outside, one at x {x:g}, y "
            f"{y:g}: coordinates must be pixels of this image, x to the right"
        )


def _matched(image: Annotated, extent: Extent, search: Search, found: Detection) -> Scored:
    searched = search.searched(extent)
    points, pairs = match(found, image.points, search.radius_um / search.mpp, searched)
    area_mm2 = math.prod(searched) * search.mpp**2 / 1e6
    return Scored(image.name, image.path, extent, search.mpp, found, points, pairs, area_mm2)


def match(
    found: Detection,
    annotated: Float64[np.ndarray, "annotated 2"],
    radius_px: float,
    searched: tuple[float, float],
) -> tuple[Float64[np.ndarray, "kept 2"], Int64[np.ndarray, "pair 2"]]:
    """What counts of the annotated nuclei, and the rows (found, annotated) that belong together.

    Those beyond the width and height that were searched count where they are hits only, of a
    nucleus that reaches in.
    """
    pairs = _score.pairs(found.centroid_px.astype(np.float64), annotated, radius_px)
    kept = (annotated <= searched).all(axis=1)
    kept[pairs[:, 1]] = True
    pairs[:, 1] = np.cumsum(kept)[pairs[:, 1]] - 1
    return annotated[kept], pairs
