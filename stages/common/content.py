"""What each position of a slide holds, of what stages/common/foreground.py found."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from stages.common import focus
from stages.common.foreground import Survey
from stages.common.sampling import Grid, Values

LEAST_STAINED = 0.02  # of a position: what holds less shows no focus


@dataclass(frozen=True)
class Content:
    """A value a position."""

    cells_um2: Values  # area of sharp cells
    middle_um2: Values  # the same within the patch's middle
    blur_um: Values  # of the edges there, NaN where nothing has any
    emptiness: Values  # share of bare glass, 0 to 1
    limit_um: float  # what is blurred more is out of focus

    def holds_cells(self, least_um2: float, central: bool) -> Bool[np.ndarray, " position"]:
        """Positions with at least so much of cells, in their middle too if `central`."""
        whole = self.cells_um2 >= least_um2
        return whole & (self.middle_um2 >= least_um2) if central else whole

    @property
    def out_of_focus(self) -> Bool[np.ndarray, " position"]:
        """Positions that show something, and nothing sharp."""
        return (self.blur_um > self.limit_um) & (self.emptiness <= 1 - LEAST_STAINED)


def of(found: Survey, grid: Grid, patch_px: int, limit_um: float) -> Content:
    """Judge every position of the grid.

    Args:
        found: The slide's cells and map.
        grid: The positions.
        patch_px: Side of a patch.
        limit_um: Blur of the softest edge that is in focus, a Gaussian's sigma.
    """
    sharp = found.cells[found.cells.blur_um <= limit_um]
    areas = (
        places.sums(sharp.x, sharp.y, sharp.area_um2) for places in (grid, grid.middle(patch_px))
    )
    square = found.squares
    once, again, stained, whole = (
        grid.sums(square.x, square.y, values)
        for values in (square.once, square.again, square.stained_um2, square.area_um2)
    )
    empty = 1 - np.divide(stained, whole, out=np.zeros_like(whole), where=whole > 0)
    return Content(*areas, focus.blur_um(once, again), empty, limit_um)
