"""Plug-ins by file name: `stages/<family>/<name>.py` is the plug-in called <name>."""

import importlib
from pathlib import Path
from types import ModuleType

STAGES = Path(__file__).resolve().parent.parent


def names(family: str) -> list[str]:
    """The plug-ins of a family; files that start with an underscore are their private parts."""
    files = (STAGES / family).glob("[!_]*.py")
    return sorted(file.stem for file in files)


def load(family: str, name: str) -> ModuleType:
    """Import `stages/<family>/<name>.py`.

    Raises:
        ValueError: there is no such file; the message lists those that exist.
    """
    check(family, name)
    return importlib.import_module(f"stages.{family}.{name}")


def check(family: str, name: str) -> None:
    """Refuse a name that is no plug-in of the family, without importing any."""
    if name not in names(family):
        known = ", ".join(names(family))
        raise ValueError(f"no {name!r} in stages/{family}: choose one of {known}")
