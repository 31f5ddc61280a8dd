"""Weights from elsewhere: safetensors files and timm's hub, fitted to an encoder.

Pickled checkpoints are not read: opening one can run code.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.common import architectures

HEADS = ("head.", "head_dist.", "fc.", "mask_token")  # an encoder has none of these
RESAMPLED = ("pos_embed", "patch_embed.proj.weight")
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")


def read(source: str, architecture: str) -> dict[str, Tensor]:
    """The weights that `source` names: timm, or the path of a safetensors file.

    Raises:
        OSError: timm's hub was not reached, or there is no such file.
        ValueError: the file is no safetensors file, or the hub has no weights.
    """
    if source == "timm":
        return architectures.from_hub(architecture)
    path = Path(source)
    if path.suffix in PICKLED:
        raise ValueError(
            f"{path} is pickled, and opening it could run code: convert it where you trust it, "
            'with `python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
            f"'{path.name}', weights_only=True), '{path.stem}.safetensors')\"`"
        )
    return tensors(path)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: `weights` must be none, timm or the path of a safetensors file"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file: {error}; fetch or convert it again"
        ) from None


def fit(model: nn.Module, found: dict[str, Tensor], source: str) -> None:
    """Give an encoder all its weights from `found`.

    Positions and the patch embedding are resampled where the sizes differ, heads are left out, and
    tables of relative positions that `found` has not are zero, which changes no number.

    Raises:
        ValueError: tensors are missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    try:
        given = architectures.adapted(model, found)
    except (RuntimeError, KeyError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(
            f"the weights from {source} cannot be fitted to the encoder: {error}; they must be of "
            "its architecture"
        ) from None
    given = {
        name: value.to(wanted[name].dtype) if name in wanted else value
        for name, value in given.items()
        if not name.startswith(HEADS)
    }
    tables = {
        name: torch.zeros(value.shape)
        for name, value in wanted.items()
        if ".table_" in name and name not in given
    }
    given = {**given, **tables}
    check(given, wanted, f"the weights from {source}")
    model.load_state_dict(given, assign=any(value.is_meta for value in wanted.values()))


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Refuse weights that are not exactly those of an encoder, naming the first that differ.

    Raises:
        ValueError: tensors are missing, unknown, or of another shape or kind of number.
    """
    absent, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if absent or unknown:
        raise ValueError(
            f"{what} do not fit: {_some(absent)} missing, {_some(unknown)} unknown; "
            "sparse_topk, irpe and architecture must be those it was trained with"
        )
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{what} do not fit: {name} is {list(found[name].shape)} and the spec needs "
                f"{list(value.shape)}"
            )
        if found[name].dtype != value.dtype:
            raise ValueError(
                f"{what} do not fit: {name} is {found[name].dtype} and must be {value.dtype}"
            )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}, ...)" if names else "none"


def digest(model: nn.Module) -> str:
    """SHA-256 of an encoder's weights, without those that are resampled or ours."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in RESAMPLED and ".table_" not in name:
            total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            total.update(value.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()
