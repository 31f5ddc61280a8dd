"""Weights of Cellpose: where they lie, what they are, which release has their network."""

import os
import pickle
from importlib import metadata
from pathlib import Path
from types import ModuleType

from stages.common import digests

HOME = "https://huggingface.co/mouseland/cellpose-sam"
ANEW = (
    f"compare its sha256 with that on the page of the file, fetch it anew from {HOME}, or set "
    "detect.cellpose.weights"
)


def library() -> tuple[ModuleType, str]:
    """Cellpose's models and its release.

    Raises:
        ImportError: cellpose is not installed.
    """
    try:
        from cellpose import models
    except ImportError as error:
        raise _not_installed(error) from error
    return models, release()


def release() -> str:
    """The installed release, found without importing it.

    Raises:
        ImportError: cellpose is not installed.
    """
    try:
        return metadata.version("cellpose")
    except metadata.PackageNotFoundError as error:
        raise _not_installed(error) from error


def _not_installed(error: Exception) -> ImportError:
    return ImportError(
        f"the detector cellpose cannot be imported ({error}): install it by "
        "`pip install 'cytossl[cellpose]'`, or set detect.detector to hematoxylin"
    )


def places(weights: str) -> tuple[Path, Path]:
    """A file of that name, and where cellpose keeps the model of that name."""
    kept = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose" / "models"
    return Path(weights), Path(kept) / weights


def check_name(weights: str) -> None:
    """Refuse the path of a file that is not there; what is no path may be a model's name."""
    if "/" in weights or Path(weights).suffix:
        raise FileNotFoundError(
            f"detect.cellpose.weights is {weights}, and there is no such file: mend the path, or "
            f"name a model, as cpsam ({HOME})"
        )


def named(path: Path) -> str:
    """A file and its digest, for messages."""
    return f"{path} (sha256 {digests.digest_of([path])})"


def locate(weights: str, models: ModuleType) -> Path:
    """The file of that name, or of the model of that name, which cellpose may have to fetch.

    Raises:
        FileNotFoundError: it is neither, or cannot be fetched.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if weights not in models.MODEL_NAMES:
        raise FileNotFoundError(
            f"detect.cellpose.weights is {weights}: it must be a file or one of "
            f"{', '.join(models.MODEL_NAMES)}; get the file cpsam from {HOME}"
        )
    try:
        fetch = getattr(models, "model_path", models.cache_model_path)  # the former: cellpose 3
        return Path(fetch(weights))
    except OSError as error:
        raise FileNotFoundError(
            f"the weights {weights} cannot be fetched ({error}): get the file from {HOME} where "
            "there is a network, and put its path into detect.cellpose.weights"
        ) from error


def keys(path: Path) -> set[str]:
    """Names of the weights in a file; nothing but tensors is ever unpickled."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, KeyError) as error:
        why = type(error).__name__  # torch's own words advise to run what is in the file
        raise ValueError(f"{named(path)} holds no weights ({why}): {ANEW}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{named(path)} holds no weights by name but a {type(state).__name__}: {ANEW}"
        )
    return {name.removeprefix("module.") for name in state}


def check_generation(path: Path, reads_colour: bool, release: str) -> None:
    """Refuse weights of a network that this release does not have.

    Raises:
        ImportError: see above.
    """
    major = int(release.split(".")[0])
    if reads_colour and major < 4:
        raise ImportError(
            f"{path} holds weights of cellpose 4, and {release} is installed: install "
            "'cellpose>=4', or set detect.cellpose.weights to weights of cellpose 1 to 3"
        )
    if not reads_colour and major > 3:
        raise ImportError(
            f"{path} holds no weights of cellpose 4, and {release} has no network for those of "
            "cellpose 1 to 3: install 'cellpose<4', or set detect.cellpose.weights to cpsam"
        )
