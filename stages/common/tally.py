"""A slide's nuclei in a few numbers, kept beside them: cheap to read for thousands of slides.

tally.json    meaning
patches       count
nuclei        count
per_patch     n: patches that hold n nuclei
radius_um     p05 to p95: quantiles; empty without nuclei
radius_bins   k: nuclei with a radius from k to k + 1 times RADIUS_BIN_UM
limits_um     least, most: radii beyond which the detector drops nuclei, where its params say so
at_limit      least, most: nuclei with a radius within the share AT_LIMIT of that limit
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

FILE = "tally.json"
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
RADIUS_BIN_UM = 0.25
AT_LIMIT = 0.2
LIMITS = {"least": "min_radius_um", "most": "max_radius_um"}  # a detector's params, if it has them


@dataclass(frozen=True)
class Tally:
    """The table above."""

    patches: int
    nuclei: int
    per_patch: dict[int, int]
    radius_um: dict[str, float]
    radius_bins: dict[int, int]
    limits_um: dict[str, float]
    at_limit: dict[str, int]


def of(
    patches: int,
    patch_index: Int[np.ndarray, " nuclei"],
    radius_um: Float[np.ndarray, " nuclei"],
    limits_um: dict[str, float] | None = None,
) -> Tally:
    """Tally one slide's nuclei.

    Args:
        patches: Count.
        patch_index: The patch of each nucleus, from 0 to `patches` - 1.
        radius_um: Microns.
        limits_um: See the table above; None: the detector has none.
    """
    radius = radius_um.astype(np.float64)
    quantiles = np.quantile(radius, list(QUANTILES.values())) if radius.size else []
    return Tally(
        patches=patches,
        nuclei=len(radius),
        per_patch=_counts(np.bincount(patch_index, minlength=patches)),
        radius_um={name: round(float(q), 4) for name, q in zip(QUANTILES, quantiles, strict=False)},
        radius_bins=_counts(np.floor(radius / RADIUS_BIN_UM).astype(np.int64)),
        limits_um=limits_um or {},
        at_limit={side: _at_limit(radius, side, um) for side, um in (limits_um or {}).items()},
    )


def _at_limit(radius: Float[np.ndarray, " nuclei"], side: str, limit_um: float) -> int:
    if side == "least":
        return int((radius <= limit_um * (1 + AT_LIMIT)).sum())
    return int((radius >= limit_um * (1 - AT_LIMIT)).sum())


def total(tallies: list[Tally]) -> Tally:
    """The tally of all slides together; of its quantiles only p50 is known, up to a bin's width."""
    bins = _sum([one.radius_bins for one in tallies])
    return Tally(
        patches=sum(one.patches for one in tallies),
        nuclei=sum(one.nuclei for one in tallies),
        per_patch=_sum([one.per_patch for one in tallies]),
        radius_um={"p50": _median(bins)} if bins else {},
        radius_bins=bins,
        limits_um=next((one.limits_um for one in tallies), {}),
        at_limit=_sum([one.at_limit for one in tallies]),
    )


def _sum(parts: list[dict[Any, int]]) -> dict[Any, int]:
    counts: Counter[Any] = Counter()
    for part in parts:
        counts.update(part)
    return dict(sorted(counts.items()))


def _median(bins: dict[int, int]) -> float:
    """Of a histogram, its counts spread evenly over their bins."""
    edges = [0, *np.cumsum(list(bins.values()))]
    at = int(np.searchsorted(edges, edges[-1] / 2)) - 1  # the bin in which half is passed
    share = (edges[-1] / 2 - edges[at]) / (edges[at + 1] - edges[at])
    return round(float((list(bins)[at] + share) * RADIUS_BIN_UM), 4)


def _counts(values: Int[np.ndarray, " value"]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def write(folder: Path, tally: Tally) -> None:
    """Write `tally.json` into a slide's folder."""
    (folder / FILE).write_text(json.dumps(asdict(tally)) + "\n", encoding="utf-8")


def read(folder: Path) -> Tally:
    """Read a slide's `tally.json`.

    Raises:
        FileNotFoundError: the slide has none.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `dvc repro detect` first")
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in ("per_patch", "radius_bins"):  # JSON has text for keys
        values[name] = {int(key): count for key, count in values[name].items()}
    return Tally(**values)
