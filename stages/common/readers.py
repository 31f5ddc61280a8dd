"""Choose what reads a file: OpenSlide, a plug-in for the file's suffix, or Pillow.

Whole-slide files are read by OpenSlide (`stages.common.pyramid`), what it does not open by the
plug-in for its suffix (`stages/readers`), and plain images by Pillow (`stages.common.plain`).
"""

from pathlib import Path
from typing import Any

from stages.common import plugins
from stages.common.plain import PYRAMID, Plain
from stages.common.pyramid import Pyramid, knows
from stages.common.slide_files import COMPANIONS, content_files

# Pillow would open the thumbnail page of some of these, and pass it for the slide.
WHOLE_SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"}
OTHER_SUFFIXES = {".tif", ".tiff", ".dcm", ".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# Formats that OpenSlide does not know, and what turns them into one that it does.
CONVERTERS = {
    ".kfb": "KFB2SVS, the converter of KFBIO",
    ".sdpc": "the SVS converter of SQRAY, which whoever scanned it has",
    ".tmap": "the export of UNIC's viewer, to SVS or TIFF",
    ".tron": "the export of the scanner's viewer, to SVS or TIFF",
    ".isyntax": "isyntax2raw and raw2ometiff",
}


def suffixes() -> set[str]:
    """Ends of file names that tell a slide, ".svs" for one."""
    added = {f".{name}" for name in plugins.names("readers")}
    return WHOLE_SLIDE_SUFFIXES | OTHER_SUFFIXES | set(CONVERTERS) | added


def modules() -> tuple[str, ...]:
    """The plug-ins by their modules' names: digests of code, which follow imports, miss them."""
    return tuple(f"stages.readers.{name}" for name in plugins.names("readers"))


def open_file(path: Path) -> Any:
    """A `stages.readers.Reader` of the file.

    Raises:
        FileNotFoundError: there is no such file, or one that belongs to it is missing.
        ImportError: the package that reads this format is not installed.
        PermissionError: the file may not be read.
        ValueError: the file is empty, damaged, or of no known format.
    """
    suffix = path.suffix.lower()
    _check_file(path)
    if suffix in COMPANIONS:
        content_files(path)  # OpenSlide would not say which one is missing
    if not knows(path):
        return _unknown(path, suffix)
    try:
        return Pyramid(path)
    except ValueError as error:
        if suffix[1:] in plugins.names("readers"):
            return plugins.load("readers", suffix[1:]).build(path)
        raise ValueError(
            f"slide {path.name} is damaged or of a variant that OpenSlide does not read: {error}; "
            f"copy it again, or {PYRAMID}"
        ) from None


def _unknown(path: Path, suffix: str) -> Any:
    """A reader of a file that is of none of OpenSlide's formats."""
    if suffix[1:] in plugins.names("readers"):
        return plugins.load("readers", suffix[1:]).build(path)
    if suffix in CONVERTERS:
        raise ValueError(
            f"slide {path.name} is of a format that no reader here knows: convert it with "
            f"{CONVERTERS[suffix]}, or add stages/readers/{suffix[1:]}.py"
        )
    if suffix in WHOLE_SLIDE_SUFFIXES:
        raise ValueError(f"slide {path.name} is damaged, OpenSlide does not know it: copy it again")
    return Plain(path)


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise FileNotFoundError(
                f"no slide file {path}: restore it, or take it out of the cohort"
            )
        if path.stat().st_size == 0:
            raise ValueError(f"slide {path.name} has 0 bytes: copy it again")
        with path.open("rb"):
            pass
    except PermissionError:
        raise PermissionError(
            f"slide {path} may not be read by this user: change its permissions"
        ) from None
