"""DINO: a student predicts, from other views, what its own running average makes of an image."""

import copy
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cytossl_core.losses import DINOLoss
from stages.common.schedules import cosine, warmup_flat
from stages.common.views import ViewPolicy

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

    def __post_init__(self) -> None:
        """Refuse values that the loss and the schedules cannot have."""
        for name in ("prototypes", "hidden_dim", "bottleneck_dim"):
            _require(name, getattr(self, name), 1, math.inf)
        for name in ("teacher_temperature_start", "teacher_temperature"):
            _require(name, getattr(self, name), 1e-6, math.inf)
        for name in ("momentum", "teacher_temperature_warmup", "freeze_prototypes"):
            _require(name, getattr(self, name), 0, 1)
        _require("local_views", self.local_views, 0, math.inf)


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        upto = f"from {low} to {high}" if high < math.inf else f"{low} or more"
        raise ValueError(f"params.yaml: pretrain.dino.{name} is {value}: it must be {upto}")


class Head(nn.Module):
    """Embeddings to prototype logits: an MLP of 3 layers, then cosines with each prototype.

    Source:
        facebookresearch/dino, vision_transformer.py, DINOHead with norm_last_layer: a weight norm
        whose gain is frozen at 1 is a normalisation of the rows, which is how it is written here.
        MLP weights are drawn with a standard deviation of 0.02, prototypes as torch draws them.
    """

    def __init__(self, dim: int, hidden_dim: int, bottleneck_dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, prototypes, bias=False)

    def forward(self, embedding: Float[Tensor, "row dim"]) -> Float[Tensor, "row prototype"]:
        """Cosines, from -1 to 1."""
        unit = F.normalize(self.mlp(embedding), dim=-1)
        return F.linear(unit, F.normalize(self.prototypes.weight, dim=1))


class Network(nn.Module):
    """An encoder and its head: half of DINO."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(
        self, views: Views
    ) -> tuple[Float[Tensor, "view batch prototype"], Float[Tensor, "row dim"]]:
        """One pass of the encoder for each resolution, one of the head for all."""
        groups = [list(group) for _, group in itertools.groupby(views, lambda view: view.shape)]
        embedding = torch.cat([self.encoder(torch.cat(group)) for group in groups])
        return self.head(embedding).unflatten(0, (len(views), -1)), embedding


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
        head = Head(
            encoder.num_features, params.hidden_dim, params.bottleneck_dim, params.prototypes
        )
        self.student = Network(encoder, head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.loss = DINOLoss(params.prototypes, params.student_temperature, params.center_momentum)
        self._seen: tuple[Tensor, Tensor] | None = None  # the teacher's last logits, embeddings

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder, the better one of the two all through training."""
        return self.teacher.encoder

    def train(self, mode: bool = True) -> "DINO":
        """As usual, but the teacher never drops paths."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: Views, progress: float) -> Float[Tensor, ""]:
        """Cross-entropy of the student's views with the teacher's global ones, in nats."""
        with torch.no_grad():
            target, embedding = self.teacher(views[:TEACHER_VIEWS])
        logits, _ = self.student(views)
        self._seen = target, embedding
        return self.loss(logits, target, self.teacher_temperature(progress), hold=True)

    def after_backward(self, progress: float) -> None:
        """The center moves; the prototypes stay as drawn in the first part of the run."""
        self.loss.move_center()
        if progress < self.params.freeze_prototypes:
            self.student.head.prototypes.weight.grad = None

    def after_step(self, progress: float) -> None:
        """Equation 2: the teacher's parameters move towards the student's."""
        average = get_ema_multi_avg_fn(self.momentum(progress))
        average(list(self.teacher.parameters()), list(self.student.parameters()), None)

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
        spread = F.normalize(embedding.float(), dim=1).std(0).square().mean().sqrt()
        return {
            "momentum": self.momentum(progress),
            "teacher_temperature": temperature,
            "teacher_entropy": _relative_entropy(outputs).mean().item(),
            "prototypes_entropy": _relative_entropy(outputs.mean(0)).item(),
            "embedding_std": spread.item() * math.sqrt(embedding.shape[1]),
        }


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
