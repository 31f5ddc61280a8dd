"""What every run needs: logging, seeds, whole-or-absent files, metrics files."""

import contextlib
import csv
import importlib
import json
import logging
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def start(main: Callable[[], None]) -> None:
    """Run a stage's `main` with logging set up; a user's mistake ends in one line, no traceback.

    Set CYTOSSL_TRACEBACK=1 to see where an error came from.
    """
    configure()
    try:
        _imported(main)()
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        if os.environ.get("CYTOSSL_TRACEBACK"):
            raise
        logger.error("%s", _readable(error))
        raise SystemExit(1) from None


def _imported(main: Callable[[], None]) -> Callable[[], None]:
    """`main` of the module under its own name: what lies in __main__ cannot reach a worker."""
    specification = sys.modules["__main__"].__spec__
    if main.__module__ != "__main__" or specification is None:
        return main
    return getattr(importlib.import_module(specification.name), main.__name__)


def configure() -> None:
    """Log to stderr, one line per record."""
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", level=logging.INFO)
    for chatty in ("distributed", "asyncio", "matplotlib", "PIL", "tifffile", "dvclive"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _readable(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == 28:
        place = error.filename or "the disk"
        return (
            f"no space left on the disk of {place}: free some, or set CYTOSSL_CACHE to a larger "
            "disk, and run again; finished slides are kept"
        )
    return str(error)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    import torch  # here: stages that do not train must not pay for the import

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table with one line of column names."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(header)
        writer.writerows(rows)


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write a metrics file that DVC compares: nested maps of finite numbers, nothing else.

    Raises:
        ValueError: a value is a list, null, text or not finite (DVC drops or misreads those).
    """
    _check_metrics(metrics, path.name)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _check_metrics(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_metrics(inner, f"{name}: {key}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}: a metric must be a number")
    elif not math.isfinite(value):
        raise ValueError(f"{name} is {value}: a metric must be finite")
