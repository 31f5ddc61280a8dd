"""Two drawn fields and their annotations in every format that is read."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from stages.common import annotations

GROUND, NUCLEUS = (235, 230, 238), (62, 50, 110)
# Centres in pixels at 0.5 mpp, 31 um and more apart.
SPOTS = {"a.png": [(40, 45), (120, 50), (60, 150)], "b.png": [(100, 101)]}
SHAPE = (179, 211)  # height, width


def draw_images(tmp_path: Path) -> Path:
    """Two fields with four drawn nuclei of 3.5 um."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, spots in SPOTS.items():
        image = np.full((*SHAPE, 3), GROUND, np.uint8)
        for x, y in spots:
            cv2.circle(image, (x, y), 7, NUCLEUS, -1, cv2.LINE_AA)
        Image.fromarray(image).save(folder / name)
    return folder


# One is annotated off its place, one more where nothing is: of 4 found, 3 are hits, 2 missed.
TRUTH = {"a.png": [(41, 44), (119, 51), (60, 130)], "b.png": [(100, 100), (30, 31)]}


def as_csv(folder: Path, columns: str = "x,y") -> Path:
    file = folder / "truth.csv"
    lines = [f"path,{columns},cls"]
    for name, points in TRUTH.items():
        for x, y in points:
            place = f"{x + 0.5},{y + 0.5}"
            box = f"{x - 5},{y - 4},{x + 6},{y + 5}"
            lines.append(f"{name},{place if columns == 'x,y' else box},nucleus")
    file.write_text("\n".join(lines) + "\n")
    return file


def as_coco(folder: Path, shape: str) -> Path:
    images, entries = [], []
    for number, (name, points) in enumerate(TRUTH.items()):
        height, width = SHAPE
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for x, y in points:
            entry = {"id": len(entries), "image_id": number, "category_id": 7}
            if shape == "box":
                entry["bbox"] = [x - 5, y - 4, 11, 9]
            elif shape == "polygon":
                corners = [x - 5, y - 4, x + 6, y - 4, x + 6, y + 5, x - 5, y + 5]
                entry |= {"segmentation": [corners], "bbox": [0, 0, 1, 1]}
            else:
                entry["segmentation"] = runs_of(square(x, y), shape == "packed")
            entries.append(entry)
    content = {"images": images, "annotations": entries}
    content["categories"] = [{"id": 7, "name": "nucleus"}]
    file = folder / "truth.json"
    file.write_text(json.dumps(content))
    return file


def square(x: int, y: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[y - 4 : y + 5, x - 5 : x + 6] = 1
    return mask


def runs_of(mask: np.ndarray, packed: bool) -> dict:
    """COCO's run lengths, down the columns, by definition; packed as pycocotools' rleToString."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    text = ""
    for at, count in enumerate(counts):
        left = count - (counts[at - 2] if at > 2 else 0)
        more = True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return {"size": list(mask.shape), "counts": text if packed else counts}


def as_voc(folder: Path) -> Path:
    target = folder / "voc"
    target.mkdir()
    for name, points in TRUTH.items():
        things = "".join(
            f"<object><name>nucleus</name><bndbox><xmin>{x - 4}</xmin><ymin>{y - 3}</ymin>"
            f"<xmax>{x + 6}</xmax><ymax>{y + 5}</ymax></bndbox></object>"
            for x, y in points
        )
        extent = f"<size><width>{SHAPE[1]}</width><height>{SHAPE[0]}</height></size>"
        text = f"<annotation><filename>{name}</filename>{extent}{things}</annotation>"
        (target / name.replace(".png", ".xml")).write_text(text)
    return target


def as_masks(folder: Path, suffix: str, binary: bool, dtype: type = np.uint16) -> Path:
    target = folder / "masks"
    target.mkdir()
    for name, points in TRUTH.items():
        mask = np.zeros(SHAPE, dtype)
        for label, (x, y) in enumerate(points, start=1):
            mask[square(x, y) > 0] = 255 if binary else 3 * label
        Image.fromarray(mask).save((target / name).with_suffix(suffix))
    return target


FORMATS = {
    "CSV of points": as_csv,
    "CSV of boxes": lambda folder: as_csv(folder, "x0,y0,x1,y1"),
    "COCO boxes": lambda folder: as_coco(folder, "box"),
    "COCO polygons": lambda folder: as_coco(folder, "polygon"),
    "COCO runs": lambda folder: as_coco(folder, "runs"),
    "COCO packed runs": lambda folder: as_coco(folder, "packed"),
    "VOC": as_voc,
    "labels": lambda folder: as_masks(folder, ".png", binary=False),
    "labels of 32 bits": lambda folder: as_masks(folder, ".tif", False, np.int32),
    "binary": lambda folder: as_masks(folder, ".tif", binary=True, dtype=np.uint8),
}


def refused(source: Path, images: Path, message: str, error: type = ValueError, classes=()):
    with pytest.raises(error, match=message):
        annotations.read(source, images, classes)
