"""A published data set on disk, held against its publication: folders, counts, extents."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from stages.common import cohort
from stages.common.plain import FORMATS

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
NAMED = 3  # examples in a message


def home_of(section: str, slides: str, download: str) -> Path:
    """The folder that the data set was unpacked into.

    Raises:
        FileNotFoundError: it is not there.
    """
    home = cohort.locate(slides)
    if not home.is_dir():
        raise FileNotFoundError(
            f"no folder {slides}: unpack {download} there, or set {section}.slides to where it is"
        )
    return home


def folders_of(section: str, home: Path, names: Iterable[str]) -> dict[str, Path]:
    """The folders that the publication has, by name.

    Raises:
        FileNotFoundError: one is absent or misnamed; the message says what is there instead.
    """
    wanted = list(names)
    there = subfolders(home)
    missing = [name for name in wanted if not (home / name).is_dir()]
    if not missing:
        return {name: home / name for name in wanted}
    deeper = [folder for folder in there if all((folder / name).is_dir() for name in wanted)]
    if deeper:
        raise FileNotFoundError(
            f"{home} has no folder {missing[0]}, but {deeper[0]} has: set {section}.slides to that"
        )
    spellings = {folder.name.casefold(): folder.name for folder in there}
    near = difflib.get_close_matches(missing[0].casefold(), spellings, 1, 0.75)
    found = ", ".join(folder.name for folder in there) or "no folders"
    advice = f"rename {spellings[near[0]]} to {missing[0]}" if near else "unpack the set again"
    raise FileNotFoundError(
        f"{home} has no folder {' and no folder '.join(missing)}: it has {found}; the published "
        f"ones are {', '.join(wanted)}: {advice}"
    )


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out."""
    return sorted(it for it in folder.iterdir() if it.is_dir() and not it.name.startswith("."))


def images_of(folder: Path) -> list[Path]:
    """The images in a folder; Thumbs.db and what macOS leaves behind are none."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )


def check_mpp(section: str, mpp: float, why: str) -> None:
    """Refuse an mpp that the user has not set: it is measured, never guessed."""
    if mpp <= 0:
        raise ValueError(
            f"params.yaml: {section}.mpp is {mpp:g} and {why}: measure the microns per pixel, on "
            "an image of a stage micrometer or a red cell (7 to 8 microns across), and set it"
        )


def miscounted(
    section: str, found: dict[str, int], published: dict[str, int], unit: str, subset: bool
) -> list[str]:
    """What differs from the published counts; fewer are right where a subset is meant."""
    problems = []
    for name, count in published.items():
        said = f"{name} has {found[name]} {unit} and {count} are published"
        if found[name] > count:
            problems.append(f"{said}: take out what was added, copies and augmented ones")
        elif not found[name]:
            problems.append(f"{said}: unpack the set again")
        elif found[name] < count and not subset:
            problems.append(f"{said}: copy the rest, or set {section}.subset to true")
    return problems


def misshapen(files: list[Path], extent: tuple[int, int]) -> list[str]:
    """One mpp holds for all images only while all are as large as published, on either side.

    A file that is no image is left to the stage, which opens every one and names the damaged.
    """
    others = [(file, found) for file in files if (found := _extent(file)) and found != extent]
    if not others:
        return []
    listed = ", ".join(f"{file.name} {x} x {y}" for file, (x, y) in others[:NAMED])
    return [
        f"{len(others)} images are not the published {extent[0]} x {extent[1]} px ({listed}): "
        "resized ones have another mpp, so use the originals, or the source folder, whose CSV has "
        "an mpp for each"
    ]


def _extent(file: Path) -> tuple[int, int] | None:
    """The longer and the shorter side, pixels: phones turn their images. None: unreadable."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return max(width, height), min(width, height)


def refuse(section: str, problems: list[str]) -> None:
    """Tell all problems at once.

    Raises:
        ValueError: there are problems.
    """
    if problems:
        listed = "\n  ".join(problems)
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ValueError(f"{section} has {count}:\n  {listed}")
