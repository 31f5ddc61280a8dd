"""FNAC 2019: breast cytology images of fine needle aspirates, benign and malignant.

Published: A. R. Saikia et al., Tissue and Cell 57 (2019) 8-14, doi:10.1016/j.tice.2019.02.001:
212 images, 99 benign and 113 malignant (abstract); its 2,120 are augmented ones. 2,048 x 1,536 px
(the Cyto-SSL paper). The archive has the folders B and M, as the programs of two projects that use
it read them (ubc-tea/LESS-WSI, dataset_FANC.py; OpenMIBOOD, its download script).

Not established, for want of the article's text and the archive: magnification and microns per
pixel, so `mpp` has to be set; the licence, so ask the authors; file names and format, so any image
format and name is taken; whether two images are alike: the cohort stage refuses them, then take one
out and set `subset`. No patients are named: every image counts as a patient of its own, and images
of one patient may be in training and test both, which flatters every score.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from stages.common.cohort import SlideRow
from stages.sources import _published
from stages.sources.folder import portable

logger = logging.getLogger(__name__)

SECTION = "cohort.fnac2019"
LABELS = {"B": "benign", "M": "malignant"}
COUNTS = {"B": 99, "M": 113}
EXTENT = (2048, 1536)  # pixels
DOWNLOAD = "FNAC 2019 (the folders B and M)"


@dataclass(frozen=True)
class Params:
    """The section `cohort.fnac2019`."""

    slides: str  # the folder that holds B and M, within the repository or absolute
    mpp: float  # microns per pixel; 0: not set, and no published value is known
    subset: bool  # take fewer images than are published


def build(params: Params, seed: int, target: Path) -> list[SlideRow]:
    """List the images, one slide each, when all is as published.

    Raises:
        FileNotFoundError: the folder, B or M is not there.
        ValueError: mpp is not set, or counts or extents differ from the published ones.
    """
    home = _published.home_of(SECTION, params.slides, DOWNLOAD)
    folders = _published.folders_of(SECTION, home, LABELS)
    _published.check_mpp(SECTION, params.mpp, "no published value is known")
    images = {name: _published.images_of(folder) for name, folder in folders.items()}
    found = {name: len(files) for name, files in images.items()}
    problems = _published.miscounted(SECTION, found, COUNTS, "images", params.subset)
    every = [file for files in images.values() for file in files]
    _published.refuse(SECTION, problems + _published.misshapen(every, EXTENT))
    logger.warning(
        "fnac2019 names no patients: each of the %d images counts as one, and images of one "
        "patient may be in training and test both",
        len(every),
    )
    return [_row(name, file, params.mpp) for name, files in images.items() for file in files]


def _row(name: str, file: Path, mpp: float) -> SlideRow:
    slide_id = f"{name}-{file.stem}"  # B and M may number their images alike
    return SlideRow(slide_id, portable(file), LABELS[name], slide_id, "", repr(mpp), "")
