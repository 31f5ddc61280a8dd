"""What decides a detector's nuclei beside patches and params: its version, libraries and weights.

Found without importing the libraries, so that `stages.index` can ask for it at every run.
"""

from importlib import metadata
from pathlib import Path

from stages.common import digests


def of(name: str, version: int, libraries: tuple[str, ...], digest: str = "") -> str:
    """One line that changes when the detector would find other nuclei.

    Args:
        name: Of the detector.
        version: Of its own code's results.
        libraries: Distributions whose arithmetic decides the nuclei. NumPy is none of them: what it
            is used for here (sums, masks, square roots) gives the same in each of its releases.
        digest: Sha256 of the weights; empty where there are none.
    """
    parts = [f"{name} {version}", *(f"{one} {_installed(one)}" for one in libraries)]
    return ", ".join(parts + ([f"weights {digest}"] if digest else []))


def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # OpenCV has several names, an extra may be missing
        return "absent"


def digest_of(weights: Path, key: str, where: str) -> str:
    """Sha256 of a weights file, taken once and remembered until its length or time changes.

    Args:
        weights: The file.
        key: Of params.yaml that names it, for the message.
        where: What to do without it, for the message.

    Raises:
        FileNotFoundError: it is no file.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"{key} is {weights}, and there is no such file: {where}")
    return digests.digest_of([weights])
