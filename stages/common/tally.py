"""A slide's nuclei in a few numbers, kept beside them: cheap to read for thousands of slides.

tally.json    meaning
patches       count
nuclei        count
per_patch     n: patches that hold n nuclei
radius_um     p05 to p95: quantiles; empty without nuclei
radius_bins   k: nuclei with a radius from k to k + 1 times RADIUS_BIN_UM
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

FILE = "tally.json"
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
RADIUS_BIN_UM = 0.25


@dataclass(frozen=True)
class Tally:
    """The table above."""

    patches: int
    nuclei: int
    per_patch: dict[int, int]
    radius_um: dict[str, float]
    radius_bins: dict[int, int]


def of(
    patches: int, patch_index: Int[np.ndarray, " nuclei"], radius_um: Float[np.ndarray, " nuclei"]
) -> Tally:
    """Tally one slide's nuclei; `patch_index` names the patch of each, from 0 to `patches` - 1."""
    radius = radius_um.astype(np.float64)
    quantiles = np.quantile(radius, list(QUANTILES.values())) if radius.size else []
    return Tally(
        patches=patches,
        nuclei=len(radius),
        per_patch=_counts(np.bincount(patch_index, minlength=patches)),
        radius_um={name: round(float(q), 4) for name, q in zip(QUANTILES, quantiles, strict=False)},
        radius_bins=_counts(np.floor(radius / RADIUS_BIN_UM).astype(np.int64)),
    )


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
