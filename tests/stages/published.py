"""Small folders with the layouts of FNAC 2019 and NIH malaria, and what the tests do with them."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import tile
from stages.common import cohort, stores
from stages.common.perslide import Job
from stages.sources import fnac2019, nih_malaria
from stages.tile import TileParams

ROOT = Path(__file__).resolve().parents[2]
WIDE, HIGH = 67, 53
FNAC = {"slides": "fnac", "mpp": 0.25, "subset": False}
FIELDS = {
    "slides": "thin",
    "collection": "fields",
    "label_of": "image",
    "frame_px": 0,
    "mpp": 0.06,
    "subset": False,
}
CELLS = {**FIELDS, "slides": "cells", "collection": "cells", "frame_px": 61}
NAMES = {  # folder: infected images of five, as the release names its patients
    "Polygon Set": {
        "142C38P3thinF_original": 3,
        "146C47P8thin_Original_Motic": 5,
        "244C7NthinF": 0,
    },
    "Point Set": {
        "148C47P8thinOriginalOlympusCX21": 5,
        "234C92P53ThinF": 1,
        "208C67P28N_ThinF": 5,
        "344C225ThinF": 0,
        "345C236ThinF": 0,
    },
}
LABELS = {False: "negative", True: "positive"}


def paint(file: Path, seed: int, width: int = WIDE, height: int = HIGH) -> Path:
    """A bright image with a dark spot, unlike any of another seed."""
    pixels = np.random.default_rng(seed).integers(225, 245, (height, width, 3), np.uint8)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 40
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def move_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty repository."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CYTOSSL_CACHE", str(folder / "cache"))
    monkeypatch.delenv("DVC_ROOT", raising=False)


def make_fnac(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images in B and M, numbered alike."""
    monkeypatch.setattr(fnac2019, "COUNTS", {"B": 5, "M": 7})
    monkeypatch.setattr(fnac2019, "EXTENT", (WIDE, HIGH))
    for at in range(12):
        name, number = ("B", at + 1) if at < 5 else ("M", at - 4)  # numbered alike, as folders are
        paint(Path("fnac") / name / f"{name} ({number}).png", at)
    Path("fnac/B/Thumbs.db").write_bytes(b"no image")
    Path("fnac/B/._B (1).png").write_bytes(b"what macOS leaves on foreign disks")
    return Path("fnac")


def make_thin(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets of eight folders of seven patients, five fields each, with annotations."""
    monkeypatch.setattr(nih_malaria, "PATIENTS", {"Polygon Set": 3, "Point Set": 5})
    monkeypatch.setattr(nih_malaria, "SETS", {"Polygon Set": 15, "Point Set": 25})
    monkeypatch.setattr(nih_malaria, "EXTENT", (WIDE, HIGH))
    seed = 0
    for name, patients in NAMES.items():
        for patient, infected in patients.items():
            for at in range(5):
                seed += 1
                stem = f"IMG_20150813_1435{at:02d}"  # the same minute at two patients
                paint(Path("thin") / name / patient / "Img" / f"{stem}.jpg", seed)
                annotate(Path("thin") / name / patient / "GT" / f"{stem}.txt", at < infected)
    return Path("thin")


def annotate(file: Path, infected: bool) -> None:
    """An annotation as the release has them."""
    file.parent.mkdir(exist_ok=True)
    kinds = ["Uninfected", "White_Blood_Cell"] + ["Parasitized"] * infected
    lines = [f"{at},{kind},No_Comment,Point,1,10.5,20.5" for at, kind in enumerate(kinds, 1)]
    file.write_text("\n".join([f"{len(kinds)},5312,2988", *lines]) + "\n")


def make_cells(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen cells of fifteen patients, each wider than the one before."""
    monkeypatch.setattr(nih_malaria, "CELLS", {"Parasitized": 6, "Uninfected": 10})
    for at in range(16):
        infected = at < 6
        patient = f"C{at + 30}P{at + 1}thinF" if at < 12 else f"C{at + 200}ThinF"
        patient = "C30P1thinF" if at == 7 else patient  # an uninfected cell of an infected patient
        name = f"{patient}_IMG_20150619_114756a_cell_{at}.png"
        folder = Path("cells") / ("Parasitized" if infected else "Uninfected")
        paint(folder / name, at, 37 + at, 41)
    return Path("cells")


def use(source: str, settings: dict[str, object], positive: str) -> None:
    """The demo's params with this source, and shares that few patients allow."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["cohort"] |= {"source": source, "positive": positive, source: settings}
    Path("params.yaml").write_text(yaml.safe_dump(values))


def listed(source: str, settings: dict[str, object]) -> list[cohort.SlideRow]:
    """What the source gives."""
    module = {"fnac2019": fnac2019, "nih_malaria": nih_malaria}[source]
    return module.build(module.Params(**settings), 1, Path("data/cohort"))


def refused(source: str, settings: dict[str, object], message: str) -> str:
    """The message of an error that matches `message`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        listed(source, settings)
    assert re.search(message, str(caught.value)), str(caught.value)
    return str(caught.value)


def tiled(rows: list[cohort.SlideRow], patch_px: int, mpp: float) -> list[stores.PatchStore]:
    """Cut the slides by a sliding window."""
    settings = TileParams(
        mpp, patch_px, "all", 0, patch_px, False, "nuclei", 0.08, 12.0, 2.0, "zstd"
    )
    found = []
    for row in rows:
        folder = Path("out") / row.path
        folder.mkdir(parents=True)
        arguments = {"row": row, "params": settings, "seed": 0}
        tile.make(folder, Job(row.slide_id, (row.digest,), arguments))
        found.append(stores.open_patches(folder / "patches.zarr"))
    return found
