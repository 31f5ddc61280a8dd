"""Stage 6, embed: turn each slide's patches into a bag of embeddings.

    reads   data/tile/<slide>/patches.zarr          patches as they are: perturbation is for training
            data/pretrain/<encoder>                 pretrained, untrained, or one of the stage fetch
    writes  data/embed/<encoder>/<slide>/bag.zarr   one embedding per patch, rows as in the patches;
                                                    with central_crop one of its central half too
            data/embed/<encoder>/metrics.json       slides, failed
            data/embed/<encoder>/failed.csv         slides that on_error: quarantine left out

Run it with `dvc repro embed`; its settings are the `embed` section of params.yaml. On a machine with
GPUs each has a process of its own, which reads ahead on its share of the cores; on others each core
has one. h5 for TRIDENT and CLAM is written by `python -m stages.bags export <encoder> <folder>`.
"""  # noqa: E501

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stages.common import (
    cache,
    devices,
    disk,
    embedding,
    encoders,
    failures,
    footprint,
    params,
    perslide,
    run,
    stores,
)
from stages.common.embedding import Network, Part
from stages.common.perslide import Job
from stages.common.spec import EncoderSpec

TASK_BATCHES = 8  # that a GPU is given at once


@dataclass(frozen=True)
class EmbedParams:
    """Section embed of params.yaml."""

    encoders: tuple[str, ...]  # folders of data/pretrain; each is a cell of the matrix in dvc.yaml
    batch: int  # most patches that go through the encoder together
    central_crop: bool  # embed each patch's central half too, the second scale of the head less
    # Matrix products in 16 bits, where that is fast: bf16, or fp16 on GPUs older than Ampere.
    autocast: embedding.Autocast
    device: Literal["auto", "cpu", "cuda"]  # auto: every GPU there is, a process each, else CPUs

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
        ValueError: slides failed, see `perslide.run`, or there is no GPU and one is wanted.
    """
    weights = encoders.digest_of(encoder)
    folders = sorted(path for path in source.glob("*") if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"no slides in {source}: run `dvc repro tile`")
    kind = devices.pick(settings.device, "embed").split(":")[0]
    decisive = {
        "batch": settings.batch,
        "central_crop": settings.central_crop,
        "autocast": settings.autocast,
        "device": kind,  # GPUs round otherwise
    }
    given = {"encoder": encoder.resolve(), "weights": weights, **decisive}
    jobs = [_job(folder, given) for folder in folders]
    made = perslide.run(
        "embed",
        make_many,
        jobs,
        target,
        code=("stages.embed",),
        settings=decisive,
        on_error=params.load(failures.FailureParams).on_error,
        device=kind,
        together=_together(jobs, settings.batch) if kind == "cuda" else 1,
        unit="patches",
        needs=lambda missing: _needs(missing, encoder, settings.central_crop),
    )
    counts = {"slides": len(made), "failed": len(jobs) - len(made)}
    run.write_metrics(target / "metrics.json", counts)


def _job(folder: Path, given: dict[str, Any]) -> Job:
    store = (folder / "patches.zarr").resolve()
    inputs = (cache.content(folder), given["weights"])
    return Job(folder.name, inputs, {"patches": store, **given}, work=stores.count_patches(store))


def _together(jobs: list[Job], batch: int) -> int:
    """How many slides a GPU is given at once: some batches, of which the last is seldom full."""
    patches = max(sum(job.work for job in jobs), 1)
    wanted = -(-TASK_BATCHES * batch * len(jobs) // patches)
    return max(1, min(wanted, -(-len(jobs) // max(devices.count(), 1))))


def _needs(jobs: list[Job], encoder: Path, crop: bool) -> disk.Needs:
    count = footprint.cut_patches([job.arguments["patches"].parent for job in jobs])
    model = encoders.build(encoders.describe(encoder)["spec"], empty=True)
    return footprint.embed(len(jobs), count, model.num_features, crop)


def make_many(folders: list[Path], jobs: list[Job]) -> None:
    """Write the bags of several slides; on a GPU they share batches, and are equal up to rounding.

    On a CPU, which is busy with small batches too, equal slides have equal bytes in any company.
    """
    given = jobs[0].arguments
    network = _network(given["encoder"], given["weights"], given["device"], given["autocast"])
    slides = [stores.open_patches(job.arguments["patches"]) for job in jobs]
    for job, slide in zip(jobs, slides, strict=True):
        _check_resolution(slide, network.spec, job.slide_id)
    parts = (embedding.whole, embedding.central_half)[: 1 + given["central_crop"]]
    bags = _embedded(slides, network, given["batch"], parts)
    for folder, job, slide, bag in zip(folders, jobs, slides, bags, strict=True):
        _check_finite(bag, job.slide_id, given["autocast"])
        _write(folder / "bag.zarr", job, slide, bag)


def _embedded(
    slides: list[stores.PatchStore], network: Network, batch: int, parts: tuple[Part, ...]
) -> Iterator[np.ndarray]:
    """Each slide's embeddings, [part, patch, dim]."""
    if network.device.type == "cuda" and len(slides) > 1:
        yield from embedding.embed(slides, network, batch, parts, _threads())
        return
    threads = _threads() if network.device.type == "cuda" else 1
    for slide in slides:
        yield from embedding.embed([slide], network, _even(len(slide), batch), parts, threads)


def _write(path: Path, job: Job, slide: stores.PatchStore, bag: np.ndarray) -> None:
    attributes = {name: slide.attributes[name] for name in ("slide_id", "mpp", "slide_mpp")}
    attributes["input"] = "+".join(job.inputs)
    stores.create_bag(path, bag[0], slide.origin, attributes, *bag[1:])


@functools.lru_cache(maxsize=1)
def _network(folder: Path, weights: str, device: str, autocast: embedding.Autocast) -> Network:
    """Load once per process; `weights` tells encoders at one path apart."""
    torch.set_num_threads(1)  # one process per core; and sums are added in one order
    model, spec = encoders.load(folder)
    if encoders.digest_of(folder) != weights:
        raise ValueError(f"{folder} changed while it was in use: run `dvc repro embed` again")
    return Network(model, spec, devices.pick(device, "embed"), autocast)


def _even(count: int, most: int) -> int:
    """Patches per batch of a slide: as many as can be, and in each the same, so that all are full.

    So its bytes depend on it alone (stages/common/embedding.py says why).
    """
    passes = max(1, -(-count // most))
    return max(1, -(-count // passes))


def _threads() -> int:
    """How many decode patches for a GPU: this process's share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(devices.count(), 1))


def _check_resolution(patches: stores.PatchStore, spec: EncoderSpec, slide_id: str) -> None:
    found = (patches.patch_px, patches.attributes["mpp"])
    if found != (spec.patch_px, spec.mpp):
        raise ValueError(
            f"slide {slide_id} has patches of {found[0]} px at {found[1]} mpp, and the encoder was "
            f"trained on {spec.patch_px} px at {spec.mpp} mpp: cut alike (tile) or train anew"
        )


def _check_finite(found: np.ndarray, slide_id: str, autocast: str) -> None:
    broken = ~np.isfinite(found).all(axis=(0, 2))
    if broken.any():
        raise ValueError(
            f"slide {slide_id}: the embedding of patch {broken.argmax()} is not finite "
            f"({broken.sum()} of {len(broken)}): set embed.autocast, which is {autocast}, to none "
            "or bf16, or train the encoder anew"
        )


def command() -> None:
    """`python -m stages.embed <encoder>`: the name of one cell of the matrix."""
    if len(sys.argv) != 2:
        raise ValueError(f"embed got {sys.argv[1:]}: give one of embed.encoders")
    name = sys.argv[1]
    data = Path("data")
    settings = params.load(EmbedParams, "embed")
    main(data / "tile", data / "pretrain" / name, data / "embed" / name, settings)


if __name__ == "__main__":
    run.start(command)
