"""Content digests of slide files, and what else was found out about them, remembered.

A slide of gigabytes is read again only when its length, modification time or inode changed.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stages.common import cache


def read(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(files: list[Path], read: Callable[[Path], str] = read) -> str:
    """SHA-256 over the contents of a slide's files, in the order given.

    Args:
        files: All that have a part in it.
        read: Digests one that is not remembered.

    Raises:
        FileNotFoundError: a file is gone.
    """
    inner = [_remembered(_stamp(file), lambda file=file: read(file)) for file in files]
    return inner[0] if len(inner) == 1 else hashlib.sha256("\n".join(inner).encode()).hexdigest()


def once(files: list[Path], question: str, answer: Callable[[], str]) -> str:
    """What `answer` says of the files: remembered while they are the same and may be read.

    Args:
        files: All that the answer depends on, beside the question.
        question: What is asked, with the code and the values that decide the answer.
        answer: Looks at the files; an error that it raises is not remembered.
    """
    if not all(os.access(file, os.R_OK) for file in files):
        return answer()
    asked = "\n".join([question, *map(_stamp, files)])
    return _remembered(hashlib.sha256(asked.encode()).hexdigest(), answer)


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _remembered(stamp: str, answer: Callable[[], str]) -> str:
    try:
        with closing(_memory()) as memory, memory:
            row = memory.execute("SELECT digest FROM digests WHERE stamp = ?", (stamp,)).fetchone()
        if row:
            return str(row[0])
        found = answer()
        with closing(_memory()) as memory, memory:
            memory.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (stamp, found))
        return found
    except sqlite3.OperationalError as error:
        place = cache.root() / "digests.sqlite"
        raise OSError(
            f"{place} cannot be written: {error}; free space or set CYTOSSL_CACHE"
        ) from None


def _memory() -> sqlite3.Connection:
    cache.root().mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(cache.root() / "digests.sqlite", timeout=60)
    memory.execute("CREATE TABLE IF NOT EXISTS digests (stamp TEXT PRIMARY KEY, digest TEXT)")
    return memory
