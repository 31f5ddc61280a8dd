"""A picture of the first views of a run, for a look before hours of training."""

from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from stages.common import run

GAP_PX = 2


def write(
    path: Path,
    patches: UInt8[Tensor, "batch px px 3"],
    views: list[Float[Tensor, "batch 3 crop crop"]],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """A row for each patch: the patch, then its views in order, pixel for pixel."""
    spread, centre = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    columns = [view.cpu() * spread + centre for view in views]
    columns = [patches.permute(0, 3, 1, 2) / 255, *columns]
    side = max(column.shape[3] for column in columns) + GAP_PX
    square = [F.pad(view, (0, side - view.shape[3]) * 2, value=1.0) for view in columns]
    sheet = torch.stack(square, 1).permute(0, 3, 1, 4, 2).reshape(len(patches) * side, -1, 3)
    pixels = (sheet * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    with run.atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
