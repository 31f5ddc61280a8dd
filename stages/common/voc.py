"""Pascal VOC annotations, an .xml an image, read into one point a nucleus: the centre of its box.

No XML entity is expanded: a document type, where entities are defined, is an error.
"""

import xml.parsers.expat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from xml.etree import ElementTree

from stages.common.marks import Mark, extent, middle, number


class _DoctypeError(Exception):
    """The document defines a type."""


def read(files: list[Path], images: Sequence[PurePath]) -> Iterator[Mark]:
    """The marks of VOC files.

    Args:
        files: The .xml files.
        images: Paths of all images, as the annotations may name them; some tools leave out the
            suffix.

    Raises:
        ValueError: a file is no VOC, wrong at a place that is named, or the second of its image.
    """
    owners: dict[str, Path] = {}
    bare: dict[PurePath, list[PurePath]] = {}
    for image in images:
        bare.setdefault(image.with_suffix(""), []).append(image)
    for file in files:
        root = _root(file)
        name = _with_suffix(_text(root, "filename", str(file)), bare, file)
        if owners.setdefault(name, file) != file:
            raise ValueError(f"{file} and {owners[name].name} both annotate {name}: keep one")
        sides = [root.findtext(f"size/{side}") for side in ("width", "height")]
        yield Mark(name, extent_px=extent(*sides, f"{file}: size"))  # tools write 0 for unknown
        for at, thing in enumerate(root.findall("object"), start=1):
            where = f"{file}, object {at}"
            ends = [
                number(_text(thing, f"bndbox/{end}", where), f"{where}, {end}")
                for end in ("xmin", "ymin", "xmax", "ymax")
            ]
            x, y = middle(ends, f"{where}: the box")
            yield Mark(name, (x - 0.5, y - 0.5), _text(thing, "name", where))  # pixels from 1


def _with_suffix(name: str, bare: dict[PurePath, list[PurePath]], file: Path) -> str:
    """The image's path where `name` is one without its suffix, else `name`."""
    fitting = bare.get(PurePath(name), [])
    if len(fitting) > 1:
        raise ValueError(
            f"{file}: filename {name} may be {' or '.join(map(str, fitting))}: write the suffix"
        )
    return fitting[0].as_posix() if fitting else name


def _text(node: ElementTree.Element, path: str, where: str) -> str:
    text = (node.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"{where} has no {path}: it must be Pascal VOC")
    return text


def _root(file: Path) -> ElementTree.Element:
    def refuse(*_: object) -> None:
        raise _DoctypeError

    content = file.read_bytes()
    guard = xml.parsers.expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse
    try:
        guard.Parse(content, True)
        root = ElementTree.fromstring(content)
    except _DoctypeError:
        raise ValueError(
            f"{file} has a DOCTYPE, which annotations do not need: remove it"
        ) from None
    # Of encodings that expat does not know, LookupError; of those with several bytes, ValueError.
    except (xml.parsers.expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{file} is no XML: {error}; export it anew, in UTF-8") from None
    if root.tag != "annotation":
        raise ValueError(f"{file} is <{root.tag[:50]}>: it must be <annotation>, of Pascal VOC")
    return root
