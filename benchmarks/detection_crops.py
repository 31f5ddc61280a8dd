"""Crops of one cell each, whose nucleus lies near the middle: how many have a detection there.

Precision is not defined: other nuclei may lie in a crop. SIPaKMeD (Plissiti et al. 2018) states no
mpp; 0.2 is taken, by which intermediate nuclei have 3 to 4 um of radius. Crops at even places of
the sorted list served to mend hematoxylin.
"""

import csv
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from stages.common.slides import Slide
from stages.detectors import Detector

logger = logging.getLogger(__name__)

MPP = 0.2
NEAR = 0.25  # of the shorter side, from the middle: a hit

Crop = tuple[str, Path]  # class, file


def sets(shared: Path) -> dict[str, list[Crop]]:
    """The halves of SIPaKMeD; nothing where it is absent."""
    folder = shared / "sipakmed_cells"
    if not folder.is_dir():
        return {}
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted((row["path"], row["label"]) for row in csv.DictReader(file))
    crops = [(label, folder / path) for path, label in rows]
    return {"sipakmed-tuned": crops[::2], "sipakmed-held-out": crops[1::2]}


def is_hit(detector: Detector, file: Path) -> bool:
    """Whether a nucleus is found near the middle of a crop."""
    slide = Slide(file, MPP)
    image = slide.read(0, 0, slide.width_px, slide.height_px, MPP)
    middle = np.array(image.shape[1::-1]) / 2
    away = detector(image[None], MPP)[0].centroid_px - middle
    return bool((np.hypot(*away.T) <= NEAR * min(image.shape[:2])).any())


def report(name: str, detector: Detector, title: str, crops: list[Crop]) -> None:
    """Log the recall over all crops and by class."""
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for label, file in crops:
        hits[label].append(is_hit(detector, file))
    every = [hit for some in hits.values() for hit in some]
    by_class = ", ".join(
        f"{label} {np.mean(some):.2f} of {len(some)}" for label, some in hits.items()
    )
    row = "%s on %s: recall %.3f of %d, a hit within %g of the shorter side from the middle; %s"
    logger.info(row, name, title, np.mean(every), len(every), NEAR, by_class)
