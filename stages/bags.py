"""Bags to and from TRIDENT and CLAM, so that their encoders are evaluated here, and ours there.

    python -m stages.bags export pretrained out    # data/embed/pretrained -> out/{h5,pt}_files
    python -m stages.bags import features_uni uni  # <slide>.h5 or <slide>.pt -> data/embed/uni

It is no stage of the pipeline: `import` adds an encoder that `python -m stages.evaluate uni abmil`
reads like any other. The files are named after the cohort's slides. A pt says nothing of where its
patches lie: their origin, and coords when exported again, are then (-1, -1).
"""

import hashlib
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stages.common import cache, cohort, interop, run, stores
from stages.common.cohort import SlideRow
from stages.common.interop import ENDINGS, ForeignBag

logger = logging.getLogger(__name__)

UNKNOWN = -1  # as origin, of a file without coords
OBJECTIVE_MPP = 10.0  # over a magnification: what TRIDENT takes for its microns per pixel


def export_bags(encoder: str, target: Path, data: Path = Path("data")) -> None:
    """Write h5_files/<slide>.h5 and pt_files/<slide>.pt into `target`; what is there already stays.

    Args:
        encoder: A folder of data/embed.
        target: Folder to write to.
        data: Folder of all stages.

    Raises:
        FileNotFoundError: there are no bags of this encoder.
    """
    folder = _home(encoder, data)
    paths = sorted(folder.glob("*/bag.zarr"))
    if not paths:
        raise FileNotFoundError(f"no bags in {folder}: run `dvc repro embed`, or name another")
    written = sum(
        _export(path, encoder, target, data) for path in tqdm(paths, unit="slide", delay=2)
    )
    logger.info("%s: %d slides written, %d there already", target, written, len(paths) - written)


def _export(path: Path, encoder: str, target: Path, data: Path) -> bool:
    slide_id, bag = path.parent.name, stores.open_bag(path)
    h5 = target / "h5_files" / f"{slide_id}.h5"
    pt = target / "pt_files" / f"{slide_id}.pt"
    content = hashlib.sha256(bag.embedding.tobytes() + bag.origin.tobytes()).hexdigest()
    attributes = _described(slide_id, bag.attributes, data) | {"content": content}
    there = interop.attributes_of(h5) if pt.is_file() else {}
    if there == attributes:
        return False
    interop.write_pt(pt, bag.embedding)
    interop.write_h5(h5, ForeignBag(bag.embedding, bag.origin, attributes), encoder)  # last: a mark
    return True


def _described(slide_id: str, attributes: dict[str, Any], data: Path) -> dict[str, Any]:
    """Attributes of `coords`; magnifications and the patch's side only where they are known."""
    found = {"name": slide_id, "patch_level": 0, "downsample": 1, "unit": "pixels of level 0"}
    for name, theirs in (("mpp", "target_magnification"), ("slide_mpp", "level0_magnification")):
        if attributes[name]:
            found |= {name: attributes[name], theirs: OBJECTIVE_MPP / attributes[name]}
    px = attributes.get("patch_px") or _tile_px(data / "tile" / slide_id, attributes["input"])
    if px:
        found["patch_size"] = px
    if px and "mpp" in found and "slide_mpp" in found:
        found["patch_size_level0"] = round(px * found["mpp"] / found["slide_mpp"])
    return found


def _tile_px(folder: Path, made_of: str) -> int | None:
    """The side of the patches, if these are the patches that the bag was made of."""
    if not folder.is_dir() or cache.content(folder) != made_of.split("+")[0]:
        return None
    return stores.open_patches(folder / "patches.zarr").patch_px


def import_bags(source: Path, encoder: str, data: Path = Path("data")) -> None:
    """Write data/embed/<encoder>/<slide>/bag.zarr of every slide of the cohort.

    Every file is checked before the first bag is written. Bags of files that did not change stay.

    Args:
        source: Folder with <slide>.h5 or <slide>.pt.
        encoder: The name to give them; none that the pipeline makes.
        data: Folder of all stages.

    Raises:
        FileNotFoundError: there is no cohort, no such folder, or a slide without a file.
        ValueError: the files do not fit the cohort or each other, or one is no bag.
    """
    home = _home(encoder, data)
    if (data / "pretrain" / encoder).exists() or any(home.glob("*/made.json")):
        raise ValueError(f"{encoder} is an encoder of the stage embed: give another name")
    rows = {row.slide_id: row for row in cohort.read_rows(data / "cohort")}
    files = _files(source, rows)
    _check_links(home, files)
    _check_widths(files)
    written = sum(
        _import(path, rows[slide_id], home)
        for slide_id, path in tqdm(files.items(), desc="import", unit="slide", delay=2)
    )
    logger.info("%s: %d slides written, %d there already", home, written, len(files) - written)


def _home(encoder: str, data: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", encoder):
        raise ValueError(
            f"encoder {encoder!r} cannot name a folder: begin with a letter or digit, go on with "
            "letters, digits and _.-"
        )
    return data / "embed" / encoder


def _files(source: Path, rows: dict[str, SlideRow]) -> dict[str, Path]:
    """The file of each slide: exactly one, and no file without a slide."""
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}: name the one with <slide>.h5 or <slide>.pt")
    found: dict[str, Path] = {}
    for path in sorted(source.iterdir()):
        if path.suffix not in ENDINGS:
            continue
        slide_id = path.name.removesuffix(path.suffix)
        if slide_id not in rows or slide_id in (".", ".."):
            raise ValueError(
                f"{path} is of slide {slide_id!r}, which is not in cohort.csv: name the files "
                "after its column slide_id, and leave out others"
            )
        if slide_id in found:
            raise ValueError(
                f"slide {slide_id} has two files, {found[slide_id].name} and {path.name}, in "
                f"{source}: leave one"
            )
        found[slide_id] = path
    missing = [slide_id for slide_id in rows if slide_id not in found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} slides of the cohort have no file in {source}: "
            f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}; embed them too, or "
            "take them out of the cohort"
        )
    return found


def _check_links(home: Path, slide_ids: dict[str, Path]) -> None:
    for path in (home, *(home / name for name in slide_ids)):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and would be written through: remove it")


def _check_widths(files: dict[str, Path]) -> None:
    first: tuple[str, int] | None = None
    for slide_id, path in tqdm(files.items(), desc="check", unit="slide", delay=2):
        _, dim = interop.survey(path)
        first = first or (slide_id, dim)
        if dim != first[1]:
            raise ValueError(
                f"slide {slide_id} has features of {dim} numbers, slide {first[0]} of {first[1]}: "
                "they must come from one encoder"
            )


def _import(path: Path, row: SlideRow, home: Path) -> bool:
    with path.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    target = home / row.slide_id / "bag.zarr"
    slide_mpp = float(row.mpp) if row.mpp else None
    if target.is_dir():
        there = stores.open_bag(target).attributes
        if (there["input"], there["slide_mpp"]) == (content, slide_mpp):
            return False
    bag = interop.read(path)
    origin = bag.coords
    if origin is None:
        origin = np.full((len(bag.features), 2), UNKNOWN, np.int64)
    attributes = {"slide_id": row.slide_id, "slide_mpp": slide_mpp, "input": content}
    attributes |= _geometry(bag.attributes, slide_mpp)
    for leftover in target.parent.glob(".bag.zarr.*.tmp"):  # of a killed run
        shutil.rmtree(leftover)
    with run.atomic(target) as temporary:
        stores.create_bag(temporary, bag.features, origin, attributes)
        if target.exists():
            shutil.rmtree(target)
    return True


def _geometry(attributes: dict[str, Any], slide_mpp: float | None) -> dict[str, Any]:
    """The mpp and side of the patches as the file tells them; mpp is None where it does not."""
    numbers = {}
    for name in ("patch_size", "patch_size_level0", "mpp"):
        value = np.asarray(attributes.get(name, 0))
        usable = value.ndim == 0 and value.dtype.kind in "iuf" and 0 < value < np.inf
        numbers[name] = value.item() if usable else None
    px, mpp = numbers["patch_size"], numbers["mpp"]
    if mpp is None and px and numbers["patch_size_level0"] and slide_mpp:
        mpp = slide_mpp * numbers["patch_size_level0"] / px
    return {"mpp": mpp} | ({"patch_px": int(px)} if px else {})


def command() -> None:
    """`python -m stages.bags export <encoder> <folder>` or `import <folder> <encoder>`."""
    verbs = {
        "export": lambda encoder, folder: export_bags(encoder, Path(folder)),
        "import": lambda folder, encoder: import_bags(Path(folder), encoder),
    }
    if len(sys.argv) != 4 or sys.argv[1] not in verbs:
        raise ValueError(
            f"bags got {sys.argv[1:]}: give export <encoder> <folder>, or import <folder> <encoder>"
        )
    verbs[sys.argv[1]](sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    run.start(command)
