"""Stage 6, embed: turn each slide's patches into a bag of embeddings.

    reads   data/tile/<slide>/patches.zarr          patches as they are: perturbation is for training
            data/pretrain/<encoder>                 pretrained, or untrained for comparison
    writes  data/embed/<encoder>/<slide>/bag.zarr   one embedding per patch, rows as in the patches;
                                                    with central_crop one of its central half too
            data/embed/<encoder>/metrics.json       slides, failed
            data/embed/<encoder>/failed.csv         slides that on_error: quarantine left out

Run it with `dvc repro embed`; its settings are the `embed` section of params.yaml.
"""  # noqa: E501

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from stages.common import (
    appetite,
    cache,
    devices,
    disk,
    encoders,
    failures,
    params,
    perslide,
    run,
    stores,
)
from stages.common.encoders import EncoderSpec
from stages.common.perslide import Job

Patches = UInt8[Tensor, "batch height width 3"]


@dataclass(frozen=True)
class EmbedParams:
    """Section embed of params.yaml."""

    encoders: tuple[str, ...]  # folders of data/pretrain; each is a cell of the matrix in dvc.yaml
    batch: int  # patches per pass of the encoder
    central_crop: bool  # embed each patch's central half too, the second scale of the head less

    def __post_init__(self) -> None:
        """Refuse an empty batch."""
        if self.batch < 1:
            raise ValueError(f"params.yaml: embed.batch is {self.batch}: it must be 1 or more")


def main(source: Path, encoder: Path, target: Path, settings: EmbedParams) -> None:
    """Embed every slide.

    Args:
        source: Folder of the tile stage.
        encoder: Folder with a saved encoder.
        target: Folder to write to.
        settings: Section embed.

    Raises:
        FileNotFoundError: there is no such encoder, or the tile stage has not run.
        ValueError: slides failed, see `perslide.run`.
    """
    weights = encoders.digest_of(encoder)
    folders = sorted(path for path in source.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"no slides in {source}: run `dvc repro tile`")
    jobs = [
        Job(
            folder.name,
            (cache.content(folder), weights),
            {
                "patches": (folder / "patches.zarr").resolve(),
                "encoder": encoder.resolve(),
                "weights": weights,
                "batch": settings.batch,
                "central_crop": settings.central_crop,
            },
            work=stores.count_patches(folder / "patches.zarr"),
        )
        for folder in folders
    ]
    decisive = {"batch": settings.batch, "central_crop": settings.central_crop}
    made = perslide.run(
        "embed",
        make,
        jobs,
        target,
        code=("stages.embed",),
        settings=decisive,
        on_error=params.load(failures.FailureParams).on_error,
        device=_device().type,
        unit="patches",
        needs=lambda missing: _needs(missing, encoder, settings.central_crop),
    )
    counts = {"slides": len(made), "failed": len(jobs) - len(made)}
    run.write_metrics(target / "metrics.json", counts)


def _needs(jobs: list[Job], encoder: Path, crop: bool) -> disk.Needs:
    count = appetite.cut_patches([job.arguments["patches"].parent for job in jobs])
    model = encoders.build(encoders.describe(encoder)["spec"], empty=True)
    return appetite.embed(len(jobs), count, model.num_features, crop)


def make(folder: Path, job: Job) -> None:
    """Write one slide's bag."""
    given = job.arguments
    patches = stores.open_patches(given["patches"])
    model, spec = _encoder(given["encoder"], given["weights"])
    _check_resolution(patches, spec, job.slide_id)
    names = ("slide_id", "mpp", "slide_mpp")
    attributes = {name: patches.attributes[name] for name in names}
    crop = None
    if given["central_crop"]:
        crop = embed(patches, model, spec, given["batch"], central_half)
    stores.create_bag(
        folder / "bag.zarr",
        embed(patches, model, spec, given["batch"]),
        patches.origin,
        {**attributes, "input": "+".join(job.inputs)},
        crop,
    )


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, weights: str) -> tuple[nn.Module, EncoderSpec]:
    """Load once per process; `weights` tells encoders at one path apart."""
    torch.set_num_threads(1)  # one process per core; and sums are added in one order
    model, spec = encoders.load(folder)
    if encoders.digest_of(folder) != weights:
        raise ValueError(f"{folder} changed while it was in use: run `dvc repro embed` again")
    return model.to(_device()), spec


def _device() -> torch.device:
    return torch.device(devices.pick("auto", "embed"))


def _check_resolution(patches: stores.PatchStore, spec: EncoderSpec, slide_id: str) -> None:
    found = (patches.patch_px, patches.attributes["mpp"])
    if found != (spec.patch_px, spec.mpp):
        raise ValueError(
            f"slide {slide_id} has patches of {found[0]} px at {found[1]} mpp, and the encoder was "
            f"trained on {spec.patch_px} px at {spec.mpp} mpp: cut alike (tile) or train anew"
        )


def whole(patches: Patches) -> Patches:
    """The patches as they are."""
    return patches


def central_half(patches: Patches) -> Patches:
    """The middle of each patch, half its side; one pixel more where half has no middle."""
    px = patches.shape[1]
    side = px // 2 + (px - px // 2) % 2  # as odd or even as px, or the middle lies off by half
    start = (px - side) // 2
    return patches[:, start : start + side, start : start + side]


@torch.inference_mode()
def embed(
    patches: stores.PatchStore,
    model: nn.Module,
    spec: EncoderSpec,
    batch: int,
    part: Callable[[Patches], Patches] = whole,
) -> Float32[np.ndarray, "patch dim"]:
    """The class token of each patch or of its `part`, in the order of the patches.

    The encoder gets both at its own side: a part is magnified.
    """
    device = next(model.parameters()).device
    parts = [np.empty((0, model.num_features), np.float32)]
    for start in range(0, len(patches), batch):
        rows = range(start, min(start + batch, len(patches)))
        pixels = torch.from_numpy(np.stack([patches[row] for row in rows])).to(device)
        parts.append(model(encoders.prepare(part(pixels), spec)).cpu().numpy())
    return np.concatenate(parts)


def command() -> None:
    """`python -m stages.embed <encoder>`: the name of one cell of the matrix."""
    if len(sys.argv) != 2:
        raise ValueError(f"embed got {sys.argv[1:]}: give an encoder, pretrained or untrained")
    name = sys.argv[1]
    data = Path("data")
    settings = params.load(EmbedParams, "embed")
    main(data / "tile", data / "pretrain" / name, data / "embed" / name, settings)


if __name__ == "__main__":
    run.start(command)
