"""A section of params.yaml as a frozen dataclass: values live there, types and units here."""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Top:
    """The top level of params.yaml: what more than one stage obeys."""

    seed: int  # of everything drawn at random
    sparse_topk: int  # keys that each query keeps; 0: all (dense attention)
    irpe: typing.Literal["none", "k", "qk", "qkv"]  # where relative positions enter

    def __post_init__(self) -> None:
        """Refuse what no stage could use."""
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"params.yaml: seed is {self.seed}: it must be from 0 to 2147483647")
        if self.sparse_topk < 0:
            raise ValueError(
                f"params.yaml: sparse_topk is {self.sparse_topk}: it must be 1 or more, or 0 for "
                "dense attention"
            )


def load(cls: type[T], section: str = "", path: Path = Path("params.yaml")) -> T:
    """Read one section of a params file into the dataclass `cls`.

    Args:
        cls: A dataclass whose fields are the section's keys. A key that holds a map and is no field
            is a section of its own (a plug-in's) and is left alone.
        section: Dotted path of the section, e.g. "detect.hematoxylin"; empty for the top level,
            where keys that `cls` does not name are other sections and are left alone.
        path: The params file.

    Returns:
        A `cls` with every field set from the file; a field with a default may be absent there.

    Raises:
        FileNotFoundError: there is no params file.
        ValueError: the section is absent, or a key is unknown, missing or of another type.
    """
    values = section_of(section, path)
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    where = f"{path.name}: {section}." if section else f"{path.name}: "
    if section:
        _reject_unknown(values, names, where)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing: add it, {cls.__name__} says what it is")
    hints = typing.get_type_hints(cls)
    given = [name for name in names if name in values]
    return cls(**{name: _cast(values[name], hints[name], where + name) for name in given})


def section_of(section: str, path: Path = Path("params.yaml")) -> dict[str, Any]:
    """The plain values of a section of the params file, for digests and the report."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run from the repository's root, or restore the file")
    values = _parse(path)
    for depth, key in enumerate(section.split(".") if section else [], start=1):
        if not isinstance(values, dict) or key not in values:
            raise ValueError(f"{path.name}: section {_upto(section, depth)} is missing: restore it")
        values = values[key]
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: {section or 'the file'} is {values!r}: it must be a map")
    return values


def _parse(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        place = str(error).replace("\n", " ")
        raise ValueError(f"{path} is not YAML: {place}; mend it or restore the file") from None


def _upto(section: str, depth: int) -> str:
    return ".".join(section.split(".")[:depth])


def _reject_unknown(values: dict[str, Any], names: list[str], where: str) -> None:
    for key, value in values.items():
        if key not in names and not isinstance(value, dict):
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            section = where.split(": ")[1].rstrip(".")
            raise ValueError(
                f"{where}{key} is unknown: {hint}The keys of {section} are {', '.join(names)}"
            )


def _cast(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`; an int serves as a float, nothing else is converted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _cast_tuple(value, arguments, name)
    if origin in (types.UnionType, typing.Union):
        return _cast_either(value, arguments, name)
    if dataclasses.is_dataclass(kind):
        return _nested(value, kind, name)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{name} is {value!r} ({type(value).__name__}): it must be {kind.__name__}"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite")
    return value


def _cast_either(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """`value` as the first of `kinds`, or None, or one of the words that the others allow."""
    words = [word for kind in kinds[1:] for word in typing.get_args(kind)]
    if value in words or (value is None and type(None) in kinds):
        return value
    if words and type(value) is str:
        known = ", ".join(words)
        raise ValueError(f"{name} is {value!r}: it must be {kinds[0].__name__}, or one of {known}")
    return _cast(value, kinds[0], name)


def _cast_tuple(value: Any, arguments: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}: it must be a list")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"{name} has {len(value)} entries: it must have {len(kinds)}")
    return tuple(
        _cast(item, kind, f"{name}[{at}]")
        for at, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _nested(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}: it must be a map")
    fields = [field.name for field in dataclasses.fields(kind)]
    _reject_unknown(value, fields, name + ".")
    for field in fields:
        if field not in value:
            raise ValueError(f"{name}.{field} is missing: add it, {kind.__name__} says what it is")
    hints = typing.get_type_hints(kind)
    return kind(**{field: _cast(value[field], hints[field], f"{name}.{field}") for field in fields})
