"""DINO: a student predicts, from other views, what its own running average makes of an image."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import DINOLoss, IBOTLoss, koleo_loss
from stages.common.schedules import cosine, warmup_flat
from stages.common.views import ViewPolicy
from stages.methods import _health, _momentum
from stages.methods._checks import require
from stages.methods._dino_head import Head
from stages.methods._masked import Masking, hidden, masks, require_tokens

Views = list[Float[Tensor, "batch 3 px px"]]  # the teacher's two first; px differs
TEACHER_VIEWS = 2


@dataclass(frozen=True)
class Params:
    """Section pretrain.dino of params.yaml; in brackets what facebookresearch/dino has."""

    local_views: int  # small crops of each patch, seen by the student only (8)
    local_px: int  # side of a local view (96)
    global_scale: tuple[float, float]  # area of the 2 global crops, share of the patch (0.4, 1)
    local_scale: tuple[float, float]  # area of a local crop, share of the patch (0.05, 0.4)
    rotation_degrees: float  # crops are turned by up to so much either way; 180: any way (0)
    flip: float  # chance of mirroring, for each axis (0.5, left to right only)
    jitter: float  # chance of changed brightness, contrast, saturation and hue (0.8)
    gray: float  # chance of losing the colours (0.2)
    blur: tuple[float, float, float]  # chance for first, second global and locals (1, 0.1, 0.5)
    solarize: float  # chance that the second global's bright pixels are inverted (0.2)
    # Outputs of the head (65536 for 1.3 million images). lightly-train chooses by the number of
    # images: 1024 up to 20 thousand, 2048 to 50, 4096 to 100, 16384 to 200, 32768 to 500.
    prototypes: int
    hidden_dim: int  # width of the head's two hidden layers (2048)
    bottleneck_dim: int  # width of the unit vectors that meet the prototypes (256)
    student_temperature: float  # divides the student's outputs (0.1)
    # Too warm a teacher makes all outputs uniform: the loss stays at ln(prototypes). lightly-train
    # has 0.02 at first and 0.02 to the end below 20 thousand images, 0.04 and 0.07 from a million.
    teacher_temperature_start: float  # divides the teacher's outputs at first (0.04)
    teacher_temperature: float  # after the warm-up; above 0.07 unstable (0.04 to 0.07)
    teacher_temperature_warmup: float  # length of that warm-up, share of the run (0.3)
    center_momentum: float  # share of the old center that a step keeps (0.9)
    momentum: float  # share of the old teacher that a step keeps, at first; ends at 1 (0.996)
    freeze_prototypes: float  # share of the run in which prototypes stay as drawn (0.01)
    # Beyond Cyto-SSL and DINO, off at 0; DINOv2 and CytoFM have both.
    koleo_weight: float  # of KoLeo, for each global view of the student (DINOv2 0.1)
    ibot: Masking  # prediction of masked tokens, with a head of its own

    def __post_init__(self) -> None:
        """Refuse values that the loss and the schedules cannot have."""
        require("dino", "prototypes", self.prototypes, 2, math.inf)
        for name in ("hidden_dim", "bottleneck_dim"):
            require("dino", name, getattr(self, name), 1, math.inf)
        for name in ("student_temperature", "teacher_temperature_start", "teacher_temperature"):
            require("dino", name, getattr(self, name), 1e-6, math.inf)
        require("dino", "center_momentum", self.center_momentum, 0, 0.9999)  # 1 would never learn
        for name in ("momentum", "teacher_temperature_warmup", "freeze_prototypes"):
            require("dino", name, getattr(self, name), 0, 1)
        for name in ("local_views", "koleo_weight"):
            require("dino", name, getattr(self, name), 0, math.inf)


class Network(nn.Module):
    """An encoder and its head, half of DINO; with `masking` also what iBOT needs."""

    def __init__(self, encoder: nn.Module, params: Params) -> None:
        super().__init__()
        widths = (params.hidden_dim, params.bottleneck_dim, params.prototypes)
        dim = encoder.num_features
        self.encoder, self.head = encoder, Head(dim, *widths)
        if params.ibot.weight:
            require_tokens(encoder)
            self.token_head = Head(dim, *widths)
            self.mask_token = nn.Parameter(torch.zeros(dim))

    def forward(
        self, views: Views
    ) -> tuple[Float[Tensor, "view batch prototype"], Float[Tensor, "row dim"]]:
        """One pass of the encoder for each resolution, one of the head for all."""
        embedding = torch.cat([self.encoder(group) for group in _by_resolution(views)])
        return self.head(embedding).unflatten(0, (len(views), -1)), embedding

    def with_tokens(
        self, views: Views, masked: Bool[Tensor, "row token"], hide: bool
    ) -> tuple[Tensor, Tensor, Float[Tensor, "masked prototype"]]:
        """The same, and the head's outputs at the masked tokens of the first resolution."""
        first, *others = _by_resolution(views)
        with hidden(self.encoder, masked, self.mask_token) if hide else nullcontext():
            features = self.encoder.forward_features(first)
        tokens = features[:, self.encoder.num_prefix_tokens :][masked]
        embedding = [self.encoder.forward_head(features), *map(self.encoder, others)]
        logits = self.head(torch.cat(embedding)).unflatten(0, (len(views), -1))
        return logits, torch.cat(embedding), self.token_head(tokens)


def _by_resolution(views: Views) -> list[Float[Tensor, "row 3 px px"]]:
    return [torch.cat(list(group)) for _, group in itertools.groupby(views, lambda one: one.shape)]


class DINO(nn.Module):
    """Student, teacher and loss.

    Source:
        Caron et al. 2021, Algorithm 1, https://arxiv.org/abs/2104.14294, and main_dino.py; Cyto-SSL
        equations 1 and 2. Differs in two things: the teacher's temperature rises with every step,
        not every epoch, and warm-ups are shares of the run, so that short runs have them too.
    """

    def __init__(self, encoder: nn.Module, params: Params, image_px: int) -> None:
        super().__init__()
        self.params = params
        self.view_policies = _view_policies(params, image_px)
        self.student = Network(encoder, params)
        self.teacher = _momentum.copy_of(self.student)
        losses = (params.prototypes, params.student_temperature, params.center_momentum)
        self.loss = DINOLoss(*losses)
        self.token_loss = IBOTLoss(*losses) if params.ibot.weight else None
        self._seen: tuple[Tensor, Tensor] | None = None  # the teacher's last logits, embeddings

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder, the better one of the two all through training."""
        return self.teacher.encoder

    def train(self, mode: bool = True) -> "DINO":
        """As usual, but the teacher never drops paths."""
        super().train(mode)
        _momentum.steady(self.teacher, mode)
        return self

    def forward(
        self, views: Views, progress: float, keys: Int64[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the student's views with the teacher's global ones, in nats.

        With masked tokens or KoLeo, their weighted losses are added.
        """
        temperature = self.teacher_temperature(progress)
        if self.token_loss is not None:
            return self._with_tokens(views, temperature, keys)
        with torch.no_grad():
            target, seen = self.teacher(views[:TEACHER_VIEWS])
        logits, embedding = self.student(views)
        self._seen = target, seen
        return self.loss(logits, target, temperature, hold=True) + self._koleo(embedding, seen)

    def _with_tokens(self, views: Views, temperature: float, keys: Tensor) -> Float[Tensor, ""]:
        masked = self._masks(views, keys)
        with torch.no_grad():
            target, seen, wanted = self.teacher.with_tokens(views[:TEACHER_VIEWS], masked, False)
        logits, embedding, said = self.student.with_tokens(views, masked, True)
        self._seen = target, seen
        image = masked.nonzero()[:, 0]
        tokens = self.token_loss(said, wanted, image, len(masked), temperature, hold=True)
        loss = self.loss(logits, target, temperature, hold=True)
        return loss + self.params.ibot.weight * tokens + self._koleo(embedding, seen)

    def _masks(self, views: Views, keys: Tensor) -> Bool[Tensor, "row token"]:
        side = views[0].shape[-1] // self.student.encoder.patch_embed.patch_size[0]
        found = [masks(keys, view, side, self.params.ibot) for view in range(TEACHER_VIEWS)]
        return torch.cat(found).to(views[0].device)

    def _koleo(self, embedding: Tensor, seen: Tensor) -> Tensor | float:
        if not self.params.koleo_weight:
            return 0.0
        large = embedding[: len(seen)].chunk(TEACHER_VIEWS)
        return self.params.koleo_weight * sum(koleo_loss(view) for view in large)

    def after_backward(self, progress: float) -> None:
        """The center moves; the prototypes stay as drawn in the first part of the run."""
        self.loss.move_center()
        if self.token_loss is not None:
            self.token_loss.move_center()
        if progress < self.params.freeze_prototypes:
            self.student.head.prototypes.weight.grad = None
            if self.token_loss is not None:
                self.student.token_head.prototypes.weight.grad = None

    def after_step(self, progress: float) -> None:
        """Equation 2: the teacher's parameters move towards the student's."""
        _momentum.follow(self.teacher, self.student, self.momentum(progress))

    def momentum(self, progress: float) -> float:
        """Share of itself that the teacher keeps: half a cosine up to 1."""
        return cosine(self.params.momentum, 1.0, progress)

    def teacher_temperature(self, progress: float) -> float:
        """Rises along a line during the warm-up, then stays."""
        start, end = self.params.teacher_temperature_start, self.params.teacher_temperature
        return warmup_flat(start, end, self.params.teacher_temperature_warmup, progress)

    @torch.no_grad()
    def monitor(self, progress: float) -> dict[str, float]:
        """Signs of collapse, of the last forward.

        `teacher_entropy`: of the teacher's outputs, over ln(prototypes); 1 is uniform, 0 is one
        prototype for each image. `prototypes_entropy`: the same of their mean over the batch; near
        0 all images fall on one prototype. `embedding_std`: of the teacher's unit embeddings over
        the batch, times the root of their length; near 1 they point everywhere, at 0 all one way.
        """
        logits, embedding = self._seen
        temperature = self.teacher_temperature(progress)
        outputs = ((logits.float() - self.loss.center) / temperature).softmax(-1).flatten(0, 1)
        found = {
            "momentum": self.momentum(progress),
            "teacher_temperature": temperature,
            "teacher_entropy": _relative_entropy(outputs).mean().item(),
            "center_norm": self.loss.center.norm().item(),
        }
        if logits.shape[1] == 1:  # one patch says nothing of how patches differ
            return found
        spread = {
            "prototypes_entropy": _relative_entropy(outputs.mean(0)).item(),
            "embedding_std": _health.embedding_std(embedding),
        }
        return found | spread


def _relative_entropy(outputs: Float[Tensor, "*row prototype"]) -> Float[Tensor, "*row"]:
    return torch.special.entr(outputs).sum(-1) / math.log(max(outputs.shape[-1], 2))


def _view_policies(params: Params, image_px: int) -> list[ViewPolicy]:
    """Two global views that differ in blur and solarisation, then the local ones."""
    shared = {
        name: getattr(params, name) for name in ("rotation_degrees", "flip", "jitter", "gray")
    }
    large = {"views": 1, "crop_px": image_px, "scale": params.global_scale, **shared}
    small = {"crop_px": params.local_px, "scale": params.local_scale, **shared}
    first, second, local = params.blur
    return [
        ViewPolicy(**large, blur=first, solarize=0.0),
        ViewPolicy(**large, blur=second, solarize=params.solarize),
        ViewPolicy(views=params.local_views, **small, blur=local, solarize=0.0),
    ]


def build(encoder: nn.Module, params: Params, image_px: int) -> DINO:
    """DINO around an untrained encoder, which becomes the student's."""
    return DINO(encoder, params, image_px)
