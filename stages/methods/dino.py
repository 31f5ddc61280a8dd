"""DINO: a student predicts, from other views, what its own running average makes of an image."""

import itertools
import math
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import DINOLoss, IBOTLoss, koleo_loss
from stages.common.schedules import cosine, warmup_flat
from stages.common.views import ViewPolicy
from stages.methods import _health, _momentum
from stages.methods._dino_head import Head
from stages.methods._dino_params import AUTO, Params
from stages.methods._masked import hidden, masks, require_tokens

__all__ = ["DINO", "Head", "Network", "Params", "build"]

Views = list[Float[Tensor, "batch 3 px px"]]  # the teacher's two first; px differs
TEACHER_VIEWS = 2
WATCHED_TOKENS = 64


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
        """The same, and the head's outputs at the masked tokens of the teacher's views."""
        first, others = torch.cat(views[:TEACHER_VIEWS]), _by_resolution(views[TEACHER_VIEWS:])
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
        self._seen = _health.Seen()  # the teacher's logits, embeddings
        self._parts: dict[str, Tensor] = {}  # of the last pass's loss
        self._tokens: Tensor | None = None  # the teacher's logits at some of its tokens

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
        if self.token_loss is not None:
            return self._with_tokens(views, progress, keys)
        with torch.no_grad():
            target, seen = self.teacher(views[:TEACHER_VIEWS])
        logits, embedding = self.student(views)
        self._seen.note(progress, len(views[0]), target.flatten(0, 1), seen)
        loss = self.loss(logits, target, self.teacher_temperature(progress), hold=True)
        return loss + self._koleo(embedding, seen)

    def _with_tokens(self, views: Views, progress: float, keys: Tensor) -> Float[Tensor, ""]:
        masked, temperature = self._masks(views, keys), self.teacher_temperature(progress)
        with torch.no_grad():
            target, seen, wanted = self.teacher.with_tokens(views[:TEACHER_VIEWS], masked, False)
        logits, embedding, said = self.student.with_tokens(views, masked, True)
        self._seen.note(progress, len(views[0]), target.flatten(0, 1), seen)
        image = masked.nonzero()[:, 0]
        tokens = self.token_loss(said, wanted, image, len(masked), temperature, hold=True)
        self._parts["token_loss"], self._tokens = tokens.detach(), wanted[:WATCHED_TOKENS].clone()
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
        koleo = torch.stack([koleo_loss(view) for view in large]).sum()
        self._parts["koleo"] = koleo.detach()
        return self.params.koleo_weight * koleo

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
        """Signs of collapse, of the last step.

        `teacher_entropy`: of the teacher's outputs, over ln(prototypes); 1 is uniform, 0 is one
        prototype for each image. `prototypes_entropy`: the same of their mean over the batch; near
        0 all images fall on one prototype. `embedding_std`: of the teacher's unit embeddings over
        the batch, times the root of their length; near 1 they point everywhere, at 0 all one way.
        `token_entropy`: as `teacher_entropy`, at masked tokens. `token_loss`, `koleo`: of the last
        pass, not weighted.
        """
        logits, embedding = self._seen.rows()
        temperature = self.teacher_temperature(progress)
        outputs = ((logits - self.loss.center) / temperature).softmax(-1)
        found = {
            "momentum": self.momentum(progress),
            "teacher_temperature": temperature,
            "teacher_entropy": _relative_entropy(outputs).mean().item(),
            "center_norm": self.loss.center.norm().item(),
            **{name: value.item() for name, value in self._parts.items()},
        }
        if self._tokens is not None and len(self._tokens):
            tokens = (self._tokens.float() - self.token_loss.center) / temperature
            found["token_entropy"] = _relative_entropy(tokens.softmax(-1)).mean().item()
        if len(logits) == TEACHER_VIEWS:  # one patch says nothing of how patches differ
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
    """DINO around an untrained encoder, which becomes the student's.

    Raises:
        ValueError: `params.prototypes` is left to the data, and no data was looked at.
    """
    if params.prototypes == AUTO:
        raise ValueError(
            "pretrain.dino.prototypes is auto: `Params.fitted` must choose it by the number of "
            "patches first"
        )
    return DINO(encoder, params, image_px)
