"""The content-addressed cache of per-slide results, outside of what DVC deletes.

    <cache>/<stage>/<key[:2]>/<key>/    one finished result: its files and made.json, read-only

A result is built under a temporary name and renamed when it is whole; it is never written again.
Stages hard-link results into data/, so that DVC carries them and the disk holds them once. The
cache is $CYTOSSL_CACHE, or .cytossl beside the DVC repository's root: temporary and queued
experiments run in copies of the repository, and DVC tells them in DVC_ROOT where the original is.

`python -m stages.common.cache` links pulled outputs back into the cache (`make cache-import`).
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MADE = "made.json"
COMPARED_BYTES = 1 << 16  # files up to this length are compared, where they are not one
PICTURES = {".jpg", ".png"}  # for people: they are not read by later stages


def root() -> Path:
    """The folder of the cache."""
    chosen = os.environ.get("CYTOSSL_CACHE")
    return Path(chosen) if chosen else repository() / ".cytossl"


def repository() -> Path:
    """The user's repository, also from within a temporary copy that DVC made of it."""
    return Path(os.environ.get("DVC_ROOT", "."))


def key_of(stage: str, slide_id: str, inputs: tuple[str, ...], params: Any, code: str) -> str:
    """Everything that decides a result's bytes, as 64 hex digits. Paths and times are not in it."""
    text = json.dumps([stage, slide_id, inputs, params, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def entry(stage: str, key: str) -> Path:
    """Where the result with this key lies, or would lie."""
    return root() / stage / key[:2] / key


def build(
    stage: str, key: str, slide_id: str, provenance: dict[str, Any], make: Callable[[Path], None]
) -> None:
    """Let `make` fill a temporary folder, describe it, and rename it into the cache."""
    final = entry(stage, key)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = final.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.tmp")
    _discard(folder)
    folder.mkdir()
    try:
        make(folder)
        made = {"stage": stage, "key": key, "slide_id": slide_id, **provenance}
        made["content"] = _digest(folder)
        (folder / MADE).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        for file in _files(folder):
            file.chmod(0o444)
        _publish(folder, final)
    finally:
        _discard(folder)


def _publish(folder: Path, final: Path) -> None:
    try:
        folder.rename(final)
    except OSError as error:
        # Another process made the same result first: both are whole and equal.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def arrange(results: dict[str, Path], target: Path) -> None:
    """Let `target` hold these results by name and nothing else; what is in place stays."""
    target.mkdir(parents=True, exist_ok=True)
    with os.scandir(target) as found:
        for one in list(found):
            if not one.is_dir(follow_symlinks=False):
                os.unlink(one.path)
            elif one.name not in results or not _same(one.path, str(results[one.name])):
                shutil.rmtree(one.path)
    there = set(os.listdir(target))
    for name, source in results.items():
        if name not in there:
            link(source, target / name)


def _same(folder: str, source: str) -> bool:
    """Whether a folder holds the files of a finished result, those and no others."""
    with os.scandir(folder) as here, os.scandir(source) as there:
        found, wanted = ({one.name: one for one in some} for some in (here, there))
    return found.keys() == wanted.keys() and all(
        _same(one.path, wanted[name].path)
        if one.is_dir(follow_symlinks=False) and wanted[name].is_dir()
        else _same_file(one.path, wanted[name].path)
        for name, one in found.items()
    )


def _same_file(first: str, second: str) -> bool:
    """Whether two files are one by a hard link, or equal.

    DVC links files of equal bytes to one object, so that small ones lose the link to their result;
    a copy on another disk has its original's time. To link those anew would cost every slide.
    """
    one, other = os.lstat(first), os.lstat(second)
    if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
        return True
    if one.st_size != other.st_size or not stat.S_ISREG(one.st_mode):
        return False
    if one.st_size <= COMPARED_BYTES:
        return Path(first).read_bytes() == Path(second).read_bytes()
    return one.st_mtime_ns == other.st_mtime_ns


def link(source: Path, target: Path) -> None:
    """Put a result at `target` by hard links, or by copies where the file system has none."""
    target.mkdir(parents=True)
    with os.scandir(source) as found:
        for one in found:
            if one.is_dir():
                link(Path(one.path), target / one.name)
            else:
                _link_file(one.path, str(target / one.name))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)


def content(folder: Path) -> str:
    """Content digest of a finished result, as written when it was made."""
    return str(describe(folder)["content"])


def describe(folder: Path) -> dict[str, Any]:
    """What made.json says of a finished result.

    Raises:
        FileNotFoundError: the folder holds no finished result.
    """
    made = folder / MADE
    if not made.is_file():
        stage = folder.parent.name
        raise FileNotFoundError(f"{folder} holds no finished result: run `dvc repro {stage}` first")
    return json.loads(made.read_text())


def sweep(stage: str) -> None:
    """Remove what killed processes of this machine left unfinished."""
    host = re.escape(socket.gethostname())
    for folder in (root() / stage).glob("*/*.tmp"):
        owner = re.fullmatch(rf"[0-9a-f]+\.{host}\.(\d+)\.tmp", folder.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _discard(folder)


def _discard(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(folder):
        if file.suffix not in PICTURES and file.name != MADE:
            with file.open("rb") as opened:
                inner = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()}\n{inner}\n".encode())
    return digest.hexdigest()


def import_outputs(data: Path = Path("data")) -> int:
    """Link finished results under `data/` into the cache and return how many were new there."""
    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data} here: run `dvc pull` first")
    added = 0
    for made in sorted(data.rglob(MADE)):
        stage, key = (str(describe(made.parent)[name]) for name in ("stage", "key"))
        if not re.fullmatch(r"[a-z_]+", stage) or not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"{made} names stage {stage!r}, key {key!r}: pull or remake it")
        if _digest(made.parent) != content(made.parent):
            raise ValueError(f"{made.parent} is damaged: delete it and run `dvc checkout` again")
        final = entry(stage, key)
        if not final.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.tmp")
            link(made.parent, temporary)
            _publish(temporary, final)
            added += 1
    return added


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logger.info("%d results linked into %s", import_outputs(), root())
