"""What open stores hand out whole: nuclei and embeddings of one slide."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of one slide; shapes and units as at the head of stores.py."""

    centroid: np.ndarray
    patch_index: np.ndarray
    radius_um: np.ndarray
    score: np.ndarray
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Bag:
    """The embeddings of one slide; shapes and units as at the head of stores.py."""

    embedding: np.ndarray
    origin: np.ndarray
    attributes: dict[str, Any]
    crop: np.ndarray | None = None  # only where embed.central_crop asked for it
