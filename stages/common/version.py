"""Which version of this code is at work."""

import functools
import subprocess
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


@functools.cache
def of_code() -> str:
    """The git commit, and whether the code differs from it; the package's version without git."""
    inside = _git("ls-files", "--error-unmatch", HERE.relative_to(ROOT).as_posix())
    commit = _git("rev-parse", "HEAD") if inside else None
    if commit:
        edited = _git("status", "--porcelain", "--", "stages", "cytossl_core")
        return f"{commit} with changes" if edited else commit
    try:
        return f"cytossl {metadata.version('cytossl')}"
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:  # there is no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
