"""NIH-NLM malaria, P. falciparum in Giemsa-stained thin smears: whole fields, or cells cut out.

`fields` is NIH-NLM-ThinBloodSmearsPf, which the Cyto-SSL paper uses: 965 photographs of 5,312 x
2,988 px, 193 patients, five each; 148 patients are infected (NLM's datasheet; Kassim et al.,
IEEE JBHI 2021, doi:10.1109/JBHI.2020.3034863). On disk: `Polygon Set` (33 patients, 165 images) and
`Point Set` (160, 800), in each `<patient>/Img/<image>.jpg` and `<patient>/GT/<image>.txt`, whose
first line is a header and whose others are cells, the second field their type. These figures
and the layout are NLM's ReadMe and workbook as public programs that read the release report them.
`cells` is cell_images.zip (Rajaraman et al., PeerJ 2018, doi:10.7717/peerj.4568): 13,779 cells in
`Parasitized` and as many in `Uninfected`, 40 to 394 px wide on black; audits of the archive found
no two alike and none damaged. They were cut from the same photographs: 192 patients are in both.

A field is positive when an expert marked a parasitized cell in it (`label_of: image`) or in any
field of its patient (`patient`). The paper does not say which it means. Most of its recalls and
accuracies fit 171 positives among 240 images, and 171 is no multiple of a patient's five fields.

A patient is the number after C: `142C38P3thinF_original` and `C38P3thinF_original` are C38. So
counted the cells have 200 patients, as published; by the whole name there are 201, and the fields
192 by number, since C47P8 was photographed through two microscopes. Two names must not be two
sides of a split. 100x objective, a phone at the eyepiece; microns per pixel were not found.
Licence: the fields' is in the release (Data License Agreement), not read here.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from stages.common.cohort import SlideRow
from stages.common.slides import Slide
from stages.sources import _published
from stages.sources.folder import portable

logger = logging.getLogger(__name__)

SECTION = "cohort.nih_malaria"
SETS = {"Polygon Set": 165, "Point Set": 800}  # images
PATIENTS = {"Polygon Set": 33, "Point Set": 160}
PER_PATIENT = 5  # images
INFECTED = 148  # patients with fields
EXTENT = (5312, 2988)  # pixels of a field
CELLS = {"Parasitized": 13_779, "Uninfected": 13_779}
KINDS = {"Parasitized", "Uninfected", "White_Blood_Cell"}  # of cells, in GT
PATIENT = re.compile(r"\d*(C\d+)")
DOWNLOAD = "{} (lhncbc.nlm.nih.gov, malaria datasheet)"


@dataclass(frozen=True)
class Params:
    """The section `cohort.nih_malaria`."""

    slides: str  # the folder that holds the published folders, within the repository or absolute
    collection: Literal["fields", "cells"]  # photographs (the paper's), or cells cut out of them
    label_of: Literal["image", "patient"]  # whose infection makes a field positive; cells: image
    frame_px: int  # cells: side of the black square each is centred on; 0: cells as they are
    mpp: float  # microns per pixel; 0: not set, and no published value is known
    subset: bool  # take fewer images or patients than are published

    def __post_init__(self) -> None:
        """Refuse what the collection makes nothing of."""
        if self.frame_px < 0 or (self.frame_px and self.collection == "fields"):
            raise ValueError(
                f"{SECTION}.frame_px is {self.frame_px}: it must be 0 with fields, and 0 or more "
                "with cells"
            )
        if self.label_of == "patient" and self.collection == "cells":
            raise ValueError(f"{SECTION}.label_of is patient: a cell has its own label, set image")


def build(params: Params, seed: int, target: Path) -> list[SlideRow]:
    """List the photographs or the cells, one slide each, when all is as published.

    Raises:
        FileNotFoundError: the folder, or one that the publication has, is not there.
        ValueError: mpp is not set, or counts, extents, names or annotations are not as published.
    """
    fields = params.collection == "fields"
    name = "NIH-NLM-ThinBloodSmearsPf" if fields else "cell_images.zip"
    home = _published.home_of(SECTION, params.slides, DOWNLOAD.format(name))
    folders = _published.folders_of(SECTION, home, _sets(home, params) if fields else CELLS)
    _published.check_mpp(SECTION, params.mpp, "no published value is known")
    return _fields(folders, params) if fields else _cells(folders, params, target)


def _sets(home: Path, params: Params) -> list[str]:
    """Both sets; of a subset one may be absent."""
    present = [name for name in SETS if (home / name).is_dir()]
    return present if params.subset and present else list(SETS)


def _fields(folders: dict[str, Path], params: Params) -> list[SlideRow]:
    patients = {name: _published.subfolders(folder) for name, folder in folders.items()}
    people = {name: len(found) for name, found in patients.items()}
    published = {name: PATIENTS[name] for name in folders}
    problems = _published.miscounted(SECTION, people, published, "patients", params.subset)
    images = {name: [] for name in folders}
    for name, each in patients.items():
        for folder in each:
            found, wrong = _photographs(folder, params.subset)
            images[name] += found
            problems += wrong
    found = {name: len(files) for name, files in images.items()}
    published = {name: SETS[name] for name in folders}
    problems += _published.miscounted(SECTION, found, published, "images", params.subset)
    every = [file for files in images.values() for file in files]
    marked, wrong = _marked(every)
    _published.refuse(SECTION, problems + wrong + _published.misshapen(every, EXTENT))
    return _labelled(every, marked, params)


def _photographs(folder: Path, subset: bool) -> tuple[list[Path], list[str]]:
    """A patient's images, and what is wrong with the patient's folder."""
    if not PATIENT.match(folder.name):
        return [], [f"{folder.name} names no patient: the published names are as 142C38P3thinF"]
    if not (folder / "Img").is_dir():
        return [], [f"{folder.name} has no folder Img: unpack the set again"]
    found = _published.images_of(folder / "Img")
    if len(found) > PER_PATIENT or (len(found) < PER_PATIENT and not subset):
        said = f"{folder.name} has {len(found)} images and {PER_PATIENT} are published"
        return found, [f"{said}: unpack the set again, or set {SECTION}.subset for fewer"]
    return found, []


def _marked(images: list[Path]) -> tuple[dict[Path, bool], list[str]]:
    """Whether a parasitized cell is marked in each image, and which annotations are wrong."""
    marked, problems = {}, []
    for image in images:
        try:
            marked[image] = "Parasitized" in _kinds(image)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    return marked, problems


def _kinds(image: Path) -> set[str]:
    """The types of the cells annotated in an image."""
    patient = image.parent.parent
    file = patient / "GT" / f"{image.stem}.txt"
    said = f"{patient.name}/GT/{file.name}"
    if not file.is_file():
        raise FileNotFoundError(f"no {said}: {image.name} has no label without it; copy it again")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    kinds = {(line.split(",") + [""])[1].strip() for line in lines if line.strip()}
    if not kinds:
        raise ValueError(f"{said} annotates no cells: copy it again")
    if unknown := sorted(kinds - KINDS):
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"{said} has a cell of type {unknown[0]!r}: known are {known}")
    return kinds


def _labelled(images: list[Path], marked: dict[Path, bool], params: Params) -> list[SlideRow]:
    folders = {image: image.parent.parent.name for image in images}
    infected = {_patient(folders[image]) for image in images if marked[image]}
    whole = {folders[image] for image in images if marked[image]}
    logger.info(
        "nih_malaria: %d of %d fields have parasitized cells, in %d of %d patients' folders; "
        "published: %d of %d patients infected",
        sum(marked.values()),
        len(images),
        len(whole),
        len(set(folders.values())),
        INFECTED,
        sum(PATIENTS.values()),
    )
    rows = []
    for image in images:
        patient = _patient(folders[image])
        positive = marked[image] if params.label_of == "image" else patient in infected
        slide_id = f"{folders[image]}-{image.stem}"
        rows.append(_row(slide_id, portable(image), positive, patient, params))
    return rows


def _cells(folders: dict[str, Path], params: Params, target: Path) -> list[SlideRow]:
    cells = {name: _published.images_of(folder) for name, folder in folders.items()}
    found = {name: len(files) for name, files in cells.items()}
    problems = _published.miscounted(SECTION, found, CELLS, "cells", params.subset)
    every = [(file, name == "Parasitized") for name, files in cells.items() for file in files]
    problems += [
        f"{file.name} names no patient: the published names are as C33P1thinF_IMG_..._cell_1.png"
        for file, _ in every
        if not PATIENT.match(file.name)
    ]
    _published.refuse(SECTION, problems)
    places = _framed([file for file, _ in every], params, target) if params.frame_px else {}
    return [
        _row(file.stem, places.get(file, portable(file)), positive, _patient(file.name), params)
        for file, positive in every
    ]


def _framed(cells: list[Path], params: Params, target: Path) -> dict[Path, str]:
    """Centre each cell on a black square: the tile stage refuses images smaller than a patch."""
    shutil.rmtree(target / "slides", ignore_errors=True)
    places, problems = {}, []
    for cell in tqdm(cells, desc="nih_malaria", unit="cell"):
        try:
            pixels = _on_black(cell, params)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        place = target / "slides" / cell.stem / "cell.png"
        place.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(place)
        places[cell] = place.as_posix()
    _published.refuse(SECTION, problems)
    return places


def _on_black(cell: Path, params: Params) -> np.ndarray:
    slide = Slide(cell, params.mpp)
    width, height, side = slide.width_px, slide.height_px, params.frame_px
    if max(width, height) > side:
        raise ValueError(
            f"cell {cell.name} is {width} x {height} px and {SECTION}.frame_px is {side}: set it "
            f"to {max(width, height)} or more (the largest published cell has 394)"
        )
    square = np.zeros((side, side, 3), np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    pixels = slide.read(0, 0, width, height, slide.mpp)
    square[top : top + height, left : left + width] = pixels
    return square


def _patient(name: str) -> str:
    found = PATIENT.match(name)
    if found is None:
        raise ValueError(f"{name} names no patient: the published names begin as C33P1thinF")
    return found[1]


def _row(slide_id: str, path: str, positive: bool, patient: str, params: Params) -> SlideRow:
    label = "positive" if positive else "negative"
    return SlideRow(slide_id, path, label, patient, "", repr(params.mpp), "")
