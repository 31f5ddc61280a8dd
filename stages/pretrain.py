"""Stage 5, pretrain: teach an encoder to know a patch again from other views of it.

    reads   data/perturb/<slide>/views.zarr   perturbed patches and their retained nuclei
    writes  data/pretrain/pretrained          the encoder (layout: stages/common/encoders.py)
            data/pretrain/untrained           the same network before step 1
            data/pretrain/metrics.json        loss and health at the end
            data/pretrain/dvclive             the curves, live
            data/pretrain/views.png           first views: patch, then its views in order

Run it with `dvc repro pretrain`; its settings are the `pretrain` section of params.yaml, a section
in there named like the method, `sparse_topk` and `irpe`. A run that was stopped or killed goes on
from its last checkpoint when it is run again, and ends with the weights of an unbroken run.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from stages.common import (
    cache,
    checkpoint,
    encoders,
    fingerprint,
    optimizer,
    params,
    plugins,
    run,
    sheet,
    viewset,
)
from stages.common.chance import keys_of
from stages.common.encoders import EncoderSpec
from stages.common.journal import Journal
from stages.common.schedules import cosine, warmup_cosine
from stages.common.views import make_views
from stages.common.viewset import Batch, ViewSet
from stages.methods import Method

# Settings that change how a run goes about it and not what comes out.
INDIFFERENT = ("workers", "checkpoint_steps")
REFERENCE_BATCH = 256  # patches per step that learning_rate is given for
SHEET_ROWS = 8


@dataclass(frozen=True)
class PretrainParams:
    """Section pretrain of params.yaml; each method has a section of its own inside."""

    method: str  # a file of stages/methods
    backbone: str  # timm's name of a vision transformer (paper: vit_tiny_patch16_224)
    token_px: int  # side of a token
    global_px: int  # side of a global view, and of the image that an embedding is made from
    drop_path: float  # chance of skipping a residual branch, at the last block
    epochs: int  # passes over all patches
    batch: int  # patches per step
    optimizer: optimizer.Name  # adam: the paper's, its decay is part of the gradient
    learning_rate: float  # peak at 256 patches per step, in proportion to batch (paper: 5e-4)
    final_learning_rate: float  # at the end of the run
    warmup_epochs: float  # in which the learning rate rises from 0
    weight_decay: float  # at first; biases and norms have none
    final_weight_decay: float  # at the end of the run
    clip_norm: float  # largest norm of the gradient of any one tensor; 0: no limit
    autocast: Literal["none", "bf16"]  # bf16: matrix products in bfloat16, where it is fast
    workers: int  # processes that read patches; 0: the training process reads
    log_steps: int  # steps between two points of the curves
    checkpoint_steps: int  # steps between two checkpoints

    def __post_init__(self) -> None:
        """Refuse values with which nothing could be trained."""
        for name in ("token_px", "epochs", "batch", "log_steps", "checkpoint_steps"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("weight_decay", "final_weight_decay", "clip_norm", "workers"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("drop_path", 0 <= self.drop_path < 1, "from 0 to below 1")
        below = f"from 0 to below epochs, {self.epochs}"
        self._require("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, below)
        whole = self.global_px >= 1 and self.global_px % self.token_px == 0
        self._require("global_px", whole, f"a multiple of token_px, {self.token_px}")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"params.yaml: pretrain.{name} is {value}: it must be {what}")


def main(
    source: Path, target: Path, settings: PretrainParams, of_method: Any, top: params.Top
) -> None:
    """Train one encoder on the views in `source`; `of_method` is the method's own section.

    Raises:
        FileNotFoundError: the perturb stage has not run.
        ValueError: settings and views do not go together, or training diverged.
    """
    data = ViewSet(source)
    spec = _spec(data, settings, top)
    run.seed_everything(top.seed)
    encoder = encoders.build(spec, settings.drop_path)
    build = plugins.load("methods", settings.method).build
    method = build(encoder, of_method, spec.image_px).to(_device()).train()
    _check(data, method, settings)
    made = _provenance(data, settings, of_method, top)
    encoders.save(target / "untrained", method.encoder, spec, {**made, "steps": 0})
    _draw_views(target / "views.png", method, data, settings, top.seed)
    total = settings.epochs * (len(data) // settings.batch)
    journal = Journal(target / "dvclive", settings.log_steps, total)
    with journal, checkpoint.interruptible() as stopped:
        cached = cache.entry("pretrain", made["run"])
        train(method, data, settings, top.seed, journal, cached, stopped)
    encoders.save(target / "pretrained", method.encoder, spec, {**made, "steps": total})
    counts = {"epochs": settings.epochs, "steps": total, "views": len(data)}
    metrics = {**counts, **journal.summary(len(data) // settings.batch)}
    run.write_metrics(target / "metrics.json", metrics)


def train(
    method: Method,
    data: ViewSet,
    settings: PretrainParams,
    seed: int,
    journal: Journal,
    cached: Path,
    stopped: list[int],
) -> None:
    """Take all steps that are left after the newest checkpoint in `cached`.

    With a signal in `stopped` the run leaves a checkpoint and ends.

    Raises:
        ValueError: loss or gradient is no longer finite.
        SystemExit: a signal was received.
    """
    device, per_epoch = _device(), len(data) // settings.batch
    total = settings.epochs * per_epoch
    trained = [value for value in method.parameters() if value.requires_grad]
    adam = optimizer.build(trained, settings.optimizer)
    parts = {"method": method, "optimizer": adam, "journal": journal}
    first = checkpoint.resume(cached, parts, device)
    for step, batch in enumerate(_batches(data, settings, seed, range(first, total)), first):
        progress = step / total
        rates = _rates(settings, progress)
        optimizer.schedule(adam, **rates)
        views = _views(method, batch, seed, step // per_epoch)
        torch.manual_seed(seed + step)  # dropped paths: the same after a resume
        with torch.autocast(device.type, torch.bfloat16, settings.autocast == "bf16"):
            loss = method(views, progress)
        loss.backward()
        norm = optimizer.clip_each(trained, settings.clip_norm)
        numbers = torch.stack([loss.detach(), norm]).tolist()  # the one wait for the device
        _check_finite(*numbers, step, cached)
        method.after_backward(progress)
        adam.step()
        adam.zero_grad()
        method.after_step(progress)
        journal.note(numbers[0], len(batch.rows))
        if journal.due(step + 1):
            health = {**rates, "gradient_norm": numbers[1], **method.monitor(progress)}
            journal.write(step + 1, health)
        if stopped or (step + 1) % settings.checkpoint_steps == 0 or step + 1 == total:
            checkpoint.save(cached, step + 1, parts)
        if stopped and step + 1 < total:
            checkpoint.leave(stopped[0], step + 1, total)


def _batches(data: ViewSet, settings: PretrainParams, seed: int, steps: range) -> Iterable[Batch]:
    pinned = _device().type == "cuda"
    rows = viewset.rows_of(len(data), settings.batch, seed, steps)
    batches = viewset.loader(data, rows, settings.workers, pinned)
    bar = {"initial": steps.start, "total": steps.stop, "unit": "step", "desc": settings.method}
    return tqdm(batches, **bar)


def _rates(settings: PretrainParams, progress: float) -> dict[str, float]:
    """Learning rate and weight decay of a step."""
    peak = settings.learning_rate * settings.batch / REFERENCE_BATCH
    warmup = settings.warmup_epochs / settings.epochs
    rate = warmup_cosine(peak, settings.final_learning_rate, warmup, progress)
    decay = cosine(settings.weight_decay, settings.final_weight_decay, progress)
    return {"learning_rate": rate, "weight_decay": decay}


def _views(
    method: Method, batch: Batch, seed: int, epoch: int
) -> list[Float[Tensor, "batch 3 px px"]]:
    patches = batch.patches.to(_device(), non_blocking=True).permute(0, 3, 1, 2)
    keys = keys_of(seed, epoch, batch.rows)
    policies = method.view_policies
    return make_views(patches, batch.points, keys, policies, encoders.MEAN, encoders.STD)


def _check_finite(loss: float, norm: float, step: int, cached: Path) -> None:
    if not math.isfinite(loss + norm):
        raise ValueError(
            f"the loss is {loss} and the norm of its gradient {norm} at step {step}: both must be "
            "finite; lower pretrain.learning_rate or set pretrain.autocast to none (checkpoints "
            f"from before are in {cached})"
        )


def _check(data: ViewSet, method: Method, settings: PretrainParams) -> None:
    if len(data) < settings.batch:
        raise ValueError(
            f"params.yaml: pretrain.batch is {settings.batch}: the perturb stage made {len(data)} "
            "views and a batch must not be larger; lower it or add patches (tile)"
        )
    for policy in method.view_policies:
        if policy.crop_px % settings.token_px:
            raise ValueError(
                f"params.yaml: pretrain.{settings.method} asks for views of {policy.crop_px} px: "
                f"they must be a multiple of pretrain.token_px, {settings.token_px}"
            )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _spec(data: ViewSet, settings: PretrainParams, top: params.Top) -> EncoderSpec:
    return EncoderSpec(
        architecture=settings.backbone,
        image_px=settings.global_px,
        token_px=settings.token_px,
        sparse_topk=top.sparse_topk,
        irpe=top.irpe,
        mean=encoders.MEAN,
        std=encoders.STD,
        patch_px=data.patch_px,
        mpp=data.mpp,
    )


def _provenance(
    data: ViewSet, settings: PretrainParams, of_method: Any, top: params.Top
) -> dict[str, Any]:
    """What decides the weights; `run` is the digest of it all."""
    decisive = {name: value for name, value in asdict(settings).items() if name not in INDIFFERENT}
    decisive = {**asdict(top), "pretrain": {**decisive, settings.method: asdict(of_method)}}
    code = fingerprint.code_digest(("stages.pretrain", f"stages.methods.{settings.method}"))
    key = cache.key_of("pretrain", "", (data.digest,), decisive, code)
    return {"run": key, "data": data.digest, "code": code, "params": decisive}


def _draw_views(
    path: Path, method: Method, data: ViewSet, settings: PretrainParams, seed: int
) -> None:
    first = next(viewset.rows_of(len(data), settings.batch, seed, range(1)))[:SHEET_ROWS]
    batch = viewset.collate([data[row] for row in first])
    views = _views(method, batch, seed, 0)
    sheet.write(path, batch.patches, views, encoders.MEAN, encoders.STD)


def command() -> None:
    """`python -m stages.pretrain`."""
    settings = params.load(PretrainParams, "pretrain")
    module = plugins.load("methods", settings.method)
    of_method = params.load(module.Params, f"pretrain.{settings.method}")
    data = Path("data")
    main(data / "perturb", data / "pretrain", settings, of_method, params.load(params.Top))


if __name__ == "__main__":
    run.start(command)
