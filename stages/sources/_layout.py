"""Where the cells of a drawn slide lie: scattered, in groups, and away from the empty regions."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float

from stages.sources._cells import RECIPES

NEUTROPHIL_UM = (6.2, 7.8)  # diameter of a circle as large as the lobes together
GROUP_MEAN = 7.0  # cells of a benign group, on average
REACTIVE_SHARE = 0.08  # of the intermediate cells: a benign nucleus half again as large
ROOM_UM = {"superficial": 9.0, "intermediate": 8.0, "parabasal": 6.0}  # radius kept from others
TRIES = 30  # draws for a free place before a cell is left out


@dataclass(frozen=True)
class Spot:
    """One nucleus to draw."""

    kind: str  # a key of RECIPES, or neutrophil
    x: float  # centre, microns
    y: float
    nucleus_um: float  # diameter


@dataclass(frozen=True)
class Crowding:
    """What a slide holds of each; densities are per mm2 of slide."""

    cells_per_mm2: float  # epithelial cells
    neutrophils_per_mm2: float
    cluster_share: float  # of the epithelial cells, in groups
    abnormal_share: float  # of the epithelial cells
    empty_share: float  # of the area, without cells


class Ground:
    """The slide's area: tells where cells may lie and remembers where nuclei are."""

    def __init__(
        self, width_um: float, height_um: float, empty_share: float, rng: np.random.Generator
    ):
        self.width_um, self.height_um, self.rng = width_um, height_um, rng
        shape = (max(4, round(height_um / 20)), max(4, round(width_um / 20)))
        field = cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), (0, 0), 3.5)
        self.open = field >= np.quantile(field, empty_share)
        self.taken: list[tuple[float, float, float]] = []

    def anywhere(self) -> Float[np.ndarray, " 2"]:
        """A random place in microns, outside the empty regions."""
        while True:
            place = self.rng.uniform(0, 1, 2)
            row, column = (place[::-1] * self.open.shape).astype(int)
            if self.open[row, column]:
                return place * (self.width_um, self.height_um)

    def around(self, middle: Float[np.ndarray, " 2"], spread_um: float) -> Float[np.ndarray, " 2"]:
        """A random place near `middle`."""
        return middle + self.rng.normal(0, spread_um, 2)

    def claim(self, draw: Callable[[], Float[np.ndarray, " 2"]], kind: str) -> Spot | None:
        """Place a nucleus where no other is; None when there is no room."""
        diameter = self._diameter(kind)
        room = ROOM_UM.get(kind, 0.55 * diameter)
        for _ in range(TRIES):
            x, y = draw()
            within = 0 < x < self.width_um and 0 < y < self.height_um
            if within and self._is_free(x, y, room):
                self.taken.append((x, y, room))
                return Spot(kind, float(x), float(y), diameter)
        return None

    def _diameter(self, kind: str) -> float:
        low, high = NEUTROPHIL_UM if kind == "neutrophil" else RECIPES[kind].nucleus_um
        reactive = kind == "intermediate" and self.rng.random() < REACTIVE_SHARE
        return float(self.rng.uniform(low, high) * (1.22 if reactive else 1))

    def _is_free(self, x: float, y: float, room: float) -> bool:
        if not self.taken:
            return True
        other = np.array(self.taken)
        gap = np.hypot(other[:, 0] - x, other[:, 1] - y)
        return bool((gap > other[:, 2] + room).all())


def spots(
    width_um: float, height_um: float, crowding: Crowding, rng: np.random.Generator
) -> list[Spot]:
    """Every nucleus of one slide. How full it is varies from slide to slide."""
    ground = Ground(width_um, height_um, crowding.empty_share, rng)
    area_mm2 = width_um * height_um / 1e6
    cells = max(3, rng.poisson(crowding.cells_per_mm2 * area_mm2 * rng.lognormal(0, 0.15)))
    neutrophils = rng.poisson(crowding.neutrophils_per_mm2 * area_mm2 * rng.lognormal(-0.3, 0.8))
    abnormal = round(crowding.abnormal_share * cells)
    abnormal = max(1, abnormal) if crowding.abnormal_share else 0
    found = _abnormal(ground, abnormal)
    found += _benign(ground, cells - abnormal, crowding.cluster_share)
    found += _neutrophils(ground, neutrophils)
    return [spot for spot in found if spot]


def _abnormal(ground: Ground, count: int) -> list[Spot | None]:
    found: list[Spot | None] = []
    while len(found) < count:
        group = min(count - len(found), int(ground.rng.integers(1, 5)))
        found += _group(ground, ["abnormal"] * group, 8.5)
    return found


def _benign(ground: Ground, count: int, cluster_share: float) -> list[Spot | None]:
    rng = ground.rng
    superficial, parabasal = rng.uniform(0.15, 0.55), rng.uniform(0.02, 0.1)
    mixture = [superficial, parabasal, 1 - superficial - parabasal]
    group_rate = cluster_share / (GROUP_MEAN * (1 - cluster_share) + cluster_share)
    found: list[Spot | None] = []
    while len(found) < count:
        if rng.random() >= group_rate:
            kind = str(rng.choice(("superficial", "parabasal", "intermediate"), p=mixture))
            found.append(ground.claim(ground.anywhere, kind))
            continue
        members = min(count - len(found), int(2 + rng.geometric(1 / (GROUP_MEAN - 1))))
        if rng.random() < 0.22:
            found += _group(ground, ["parabasal"] * members, 5.5)
        else:
            kinds = rng.choice(("superficial", "parabasal", "intermediate"), members, p=mixture)
            found += _group(ground, kinds.tolist(), 15.0)
    return found


def _neutrophils(ground: Ground, count: int) -> list[Spot | None]:
    found: list[Spot | None] = []
    while len(found) < count:
        size = 1 if ground.rng.random() < 0.75 else int(ground.rng.integers(3, 16))
        found += _group(ground, ["neutrophil"] * min(size, count - len(found)), 6.0)
    return found


def _group(ground: Ground, kinds: list[str], spread_um: float) -> list[Spot | None]:
    """Cells around one place; `spread_um` is that of a single pair, more cells spread further."""
    middle = ground.anywhere()
    spread = spread_um * len(kinds) ** 0.5 * ground.rng.uniform(0.7, 1.1)
    return [ground.claim(lambda: ground.around(middle, spread), kind) for kind in kinds]
