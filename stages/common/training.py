"""What a pretraining run is told: its params, what of them decides the weights, what they mean."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.amp import GradScaler

from stages.common import backbones, cache, checkpoint, fingerprint, optimizer, params
from stages.common.schedules import cosine, warmup_cosine
from stages.common.spec import EncoderSpec, LoraParams
from stages.common.views import BLUR_PX
from stages.common.watch import WatchParams

# Settings that change how a run goes about it and not what comes out.
INDIFFERENT = (
    *("workers", "gradient_checkpointing", "log_steps", "checkpoint_steps", "keep_checkpoints"),
    "watch",
)
REFERENCE_BATCH = 256  # patches per step that learning_rate is given for
LONGEST_WARMUP = 0.5  # of the run


@dataclass(frozen=True)
class PretrainParams:
    """Section pretrain of params.yaml; each method has a section of its own inside."""

    method: str  # a file of stages/methods
    backbone: str  # timm's name of a vision transformer (paper: vit_tiny_patch16_224) or ResNet
    weights: str  # it begins with: none (random), timm (released), or a safetensors file's path
    init_from: str  # or with an encoder of this project: its folder; empty: with weights
    splits: tuple[Literal["train", "val", "test"], ...]  # of cohort.csv: whose patches train
    adapter: Literal["none", "lora"]  # lora: those stay, adapters beside them are trained
    lora: LoraParams
    token_px: int  # side of a token; 0: a backbone without tokens
    global_px: int  # side of a global view, and of the image that an embedding is made from
    drop_path: float  # chance of skipping a residual branch, at the last block
    epochs: int  # passes over all patches
    batch: int  # patches per step, on all devices together
    # Passes that a step's patches are cut into, one after the other on each device, to save memory.
    # DINO's numbers stay the same up to rounding. What compares the patches of a batch sees those
    # of one pass only: the negatives of simclr and mocov3, batch norms, koleo.
    accumulate: int
    optimizer: optimizer.Name  # adam: the paper's, its decay is part of the gradient
    learning_rate: float  # peak at 256 patches per step, in proportion to batch (paper: 5e-4)
    final_learning_rate: float  # at the end of the run, whatever the batch (as in DINO's code)
    warmup_epochs: float  # in which the learning rate rises from 0; half of the run at most
    weight_decay: float  # at first; biases and norms have none
    final_weight_decay: float  # at the end of the run
    clip_norm: float  # largest norm of the gradient of any one tensor; 0: no limit
    # Matrix products in 16 bits, where that is fast: bf16, or fp16 on GPUs older than Ampere (the
    # loss is scaled, and a step whose gradient overflows is left out).
    autocast: Literal["none", "bf16", "fp16"]
    gradient_checkpointing: bool  # compute activations again in backward: slower, far less memory
    compile: bool  # let torch.compile fuse the encoder: faster steps after minutes of compiling
    workers: int  # processes that read patches, for each device; 0: the training process reads
    log_steps: int  # steps between two points of the curves
    checkpoint_steps: int  # steps between two checkpoints
    keep_checkpoints: int  # newest ones that stay until the run ends
    watch: WatchParams

    def __post_init__(self) -> None:
        """Refuse values with which nothing could be trained."""
        counts = ("epochs", "batch", "accumulate")
        for name in (*counts, "log_steps", "checkpoint_steps", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("weight_decay", "final_weight_decay", "clip_norm", "workers", "token_px"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("final_learning_rate", self.final_learning_rate >= 0, "0 or more")
        self._require("drop_path", 0 <= self.drop_path < 1, "from 0 to below 1")
        self._require("warmup_epochs", self.warmup_epochs >= 0, "0 or more")
        self._require("splits", len(self.splits) > 0, "one or more of train, val, test")
        self._require("global_px", self.global_px >= BLUR_PX, f"{BLUR_PX} or more")
        whole = self.global_px % max(self.token_px, 1) == 0
        self._require("global_px", whole, f"a multiple of token_px, {self.token_px}")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"params.yaml: pretrain.{name} is {value}: it must be {what}")


@dataclass(frozen=True)
class Plan:
    """One run."""

    settings: PretrainParams
    spec: EncoderSpec
    seed: int
    made: dict[str, Any]  # what decides the weights, see `provenance`
    per_epoch: int  # steps

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.settings.epochs * self.per_epoch

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return cache.entry("pretrain", self.made["run"])

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows `step` steps; the end of a run has a file of its own."""
        return step % self.settings.checkpoint_steps == 0 and step < self.total

    def probes(self, step: int) -> bool:
        """Whether the row of step number `step` has a probe of the embeddings; the last has one."""
        about = self.settings.watch
        return step == self.total or about.due(step, self.settings.log_steps, self.per_epoch)


def warmup(settings: PretrainParams) -> float:
    """Share of the run in which the learning rate rises.

    A short trial of a long run's settings must warm up and learn: it ends halfway at last.
    """
    return min(settings.warmup_epochs / settings.epochs, LONGEST_WARMUP)


def rates(settings: PretrainParams, progress: float) -> dict[str, float]:
    """Learning rate and weight decay of a step."""
    peak = settings.learning_rate * settings.batch / REFERENCE_BATCH
    rate = warmup_cosine(peak, settings.final_learning_rate, warmup(settings), progress)
    decay = cosine(settings.weight_decay, settings.final_weight_decay, progress)
    return {"learning_rate": rate, "weight_decay": decay}


def autocast(settings: PretrainParams, device: torch.device) -> torch.autocast:
    """Inside, matrix products are computed as `settings` ask for."""
    dtype = torch.float16 if settings.autocast == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.autocast != "none")


def provenance(
    data: str, settings: PretrainParams, of_method: Any, top: params.Top
) -> dict[str, Any]:
    """What decides the weights; `run` is the digest of it all.

    The number of processes is no part of it: a run may go on with more or fewer, and then ends with
    the same weights up to rounding.
    """
    decisive = {name: value for name, value in asdict(settings).items() if name not in INDIFFERENT}
    decisive = {**asdict(top), "pretrain": {**decisive, settings.method: asdict(of_method)}}
    code = fingerprint.code_digest(("stages.pretrain", f"stages.methods.{settings.method}"))
    key = cache.key_of("pretrain", "", (data, *backbones.inputs(settings)), decisive, code)
    made = {"method": settings.method, "data": data, "run": key, "code": code}
    return {**made, "params": decisive}


def check_finite(loss: float, norm: float, scaler: GradScaler, step: int, folder: Path) -> None:
    """Refuse to go on with numbers that are none; an overflow of fp16 is the scaler's to mend.

    Raises:
        ValueError: see above.
    """
    mended = scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or mended):
        kept = f"; the checkpoints of this one stay in {folder}" if checkpoint.found(folder) else ""
        raise ValueError(
            f"the loss is {loss} and the norm of its gradient {norm} at step {step}: both must be "
            "finite; lower pretrain.learning_rate or set pretrain.autocast to none, which begins a "
            f"new run{kept}"
        )


def check_weights(method: nn.Module, step: int) -> None:
    """Refuse to export what the last step broke: its loss was finite, and came before it.

    Raises:
        ValueError: a weight is not finite.
    """
    for name, value in method.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{name} is not finite after the last step, {step}: nothing is exported; lower "
                "pretrain.learning_rate or set pretrain.autocast to none"
            )


@contextmanager
def memory_explained(settings: PretrainParams, devices: int) -> Iterator[None]:
    """Say which settings save memory, where there is too little.

    Raises:
        ValueError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        rows = settings.batch // devices // settings.accumulate
        raise ValueError(
            f"out of memory with {rows} patches in a pass of one device: raise pretrain.accumulate "
            f"(now {settings.accumulate}), set gradient_checkpointing to true (now "
            f"{settings.gradient_checkpointing}) or autocast to bf16 (now {settings.autocast}), or "
            f"lower pretrain.batch (now {settings.batch}); torch says: {text.splitlines()[0]}"
        ) from error
