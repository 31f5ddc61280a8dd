"""Which files make a slide: MRXS, VMS and DICOM slides are several."""

import configparser
import functools
import re
from collections import defaultdict
from pathlib import Path

HEADER_BYTES = 1 << 16
# (0020,000E), explicit or implicit value length; it may stand in references to other series too.
SERIES = re.compile(rb"\x20\x00\x0e\x00(?:UI..|.\x00\x00\x00)([0-9.]+)", re.DOTALL)
INDEXES = {".vms", ".vmu"}  # text files that name those with the pixels
COMPANIONS = {".mrxs", *INDEXES}  # are nothing without the files beside them


def content_files(path: Path) -> list[Path]:
    """Every file that holds pixels of the slide.

    Raises:
        FileNotFoundError: files of the slide are not beside it.
        ValueError: a VMS or VMU file is damaged.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return [path, *_data_folder(path)]
    if suffix in INDEXES:
        return [path, *_named(path)]
    if is_dicom(path):
        beside = _by_series(path.parent, path.parent.stat().st_mtime_ns)
        own = _series(path) or beside.keys()
        return sorted({path}.union(*(beside.get(series, ()) for series in own)))
    return [path]


def entry_file(path: Path) -> Path:
    """The file to open for a path that may be a DICOM folder or the data folder of an MRXS slide.

    Raises:
        ValueError: the folder is none of a slide, or of several.
    """
    if not path.is_dir():
        return path
    for suffix in (".mrxs", ".MRXS"):
        if path.with_name(path.name + suffix).is_file():
            return path.with_name(path.name + suffix)
    files = [file for file in sorted(path.iterdir()) if is_dicom(file)]
    if not files:
        raise ValueError(f"slide {path.name} is a folder without .dcm files: name a slide file")
    series = [found for found in map(_series, files) if found]
    if series and not set.intersection(*series):
        raise ValueError(f"folder {path.name} holds several slides: name a .dcm file of each")
    return files[0]


def is_dicom(path: Path) -> bool:
    """Whether it is a DICOM file, which may have any name."""
    if not path.is_file():
        return False
    with path.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def _series(path: Path) -> set[bytes]:
    """Identifiers of the series that a DICOM file belongs to or mentions."""
    with path.open("rb") as opened:
        return set(SERIES.findall(opened.read(HEADER_BYTES)))


@functools.lru_cache(maxsize=16)
def _by_series(folder: Path, mtime_ns: int) -> dict[bytes, list[Path]]:
    """DICOM files of a folder as it was at that time: thousands of slides may lie in one."""
    found = defaultdict(list)
    for file in filter(is_dicom, folder.iterdir()):
        for series in _series(file) or {b""}:
            found[series].append(file)
    return dict(found)


def _data_folder(path: Path) -> list[Path]:
    folder = path.with_suffix("")
    if not (folder / "Slidedat.ini").is_file():
        raise FileNotFoundError(
            f"slide {path.name} has no folder {folder.name} with its Slidedat.ini and .dat files "
            "beside it: copy that too"
        )
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _named(path: Path) -> list[Path]:
    """The files that a VMS or VMU index names."""
    index = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        index.read_string(path.read_text("latin-1"))
    except configparser.Error:
        raise ValueError(
            f"slide {path.name} is damaged, not an index of files: copy it again"
        ) from None
    values = {key: value for section in index.values() for key, value in section.items() if value}
    images = {value for key, value in values.items() if key.startswith("imagefile")}
    absent = sorted(name for name in images if not (path.parent / name).is_file())
    if absent or not images:
        raise FileNotFoundError(
            f"slide {path.name} has no {absent[0] if absent else 'ImageFile'} beside it: copy all "
            "the files that it names"
        )
    named = {path.parent / value for value in values.values() if Path(value).name == value}
    return sorted(file for file in named if file.is_file())
