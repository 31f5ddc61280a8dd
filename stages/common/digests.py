"""Content digests of slide files, computed once per file and remembered.

A slide of gigabytes is read again only when its length, modification time or inode changed.
"""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

from stages.common import cache


def digest_of(files: list[Path]) -> str:
    """SHA-256 over the contents of a slide's files, in the order given.

    Raises:
        FileNotFoundError: a file is gone.
    """
    try:
        inner = [_remembered(file) for file in files]
    except sqlite3.OperationalError as error:
        place = cache.root() / "digests.sqlite"
        raise OSError(
            f"{place} cannot be written: {error}; free space or set CYTOSSL_CACHE"
        ) from None
    return inner[0] if len(inner) == 1 else hashlib.sha256("\n".join(inner).encode()).hexdigest()


def _remembered(file: Path) -> str:
    status = file.stat()
    stamp = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    with closing(_memory()) as memory, memory:
        row = memory.execute("SELECT digest FROM digests WHERE stamp = ?", (stamp,)).fetchone()
    if row:
        return str(row[0])
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    with closing(_memory()) as memory, memory:
        memory.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (stamp, digest))
    return digest


def _memory() -> sqlite3.Connection:
    cache.root().mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(cache.root() / "digests.sqlite", timeout=60)
    memory.execute("CREATE TABLE IF NOT EXISTS digests (stamp TEXT PRIMARY KEY, digest TEXT)")
    return memory
