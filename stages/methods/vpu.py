"""VPU: patches of benign slides are known to be benign, patches of the others may be either."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cytossl_core.losses import mixed_log_target, vpu_loss
from stages.common.views import ViewPolicy
from stages.methods import _health
from stages.methods._checks import require, require_views

PAIRED = True  # of each two patches the first is of a benign slide, the second of another
_FOR_MIXING = 2**20  # numbers of random streams from here on, those below are views


@dataclass(frozen=True)
class Params:
    """Section pretrain.vpu of params.yaml; in brackets what LESS has."""

    scale: tuple[float, float]  # area of the crop, share of the patch; the paper does not say
    rotation_degrees: float  # crops are turned by up to so much either way; 180: any way
    flip: float  # chance of mirroring, for each axis
    jitter: float  # chance of changed brightness, contrast, saturation and hue
    mixup_alpha: float  # of the Beta distribution of a mixture's shares (0.3)
    mixup_weight: float  # of the regulariser (0.03)

    def __post_init__(self) -> None:
        """Refuse values that the views and the loss cannot have."""
        require_views("vpu", self)
        require("vpu", "mixup_alpha", self.mixup_alpha, 1e-3, math.inf)
        require("vpu", "mixup_weight", self.mixup_weight, 0, math.inf)


class VPU(nn.Module):
    """An encoder and a linear classifier, benign against the rest.

    Source:
        Chen et al. 2020, Algorithm 1, https://arxiv.org/abs/1906.00642; benign as the positive
        class and patches of other slides alone as the unlabelled set after LESS, Zhao et al. 2023,
        https://arxiv.org/abs/2306.03407. Differs in what of it is the stage's for all
        methods: learning rate, schedule, optimizer, views; and the last weights are kept, where
        LESS keeps those with the best loss on slides that it then tests on.
    """

    def __init__(self, encoder: nn.Module, params: Params, image_px: int) -> None:
        super().__init__()
        self.params, self.encoder = params, encoder
        own = {name: getattr(params, name) for name in ("scale", "rotation_degrees", "flip")}
        plain = {"jitter": params.jitter, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
        self.view_policies = [ViewPolicy(views=1, crop_px=image_px, **own, **plain)]
        self.classifier = nn.Linear(encoder.num_features, 2)
        self._seen: dict[str, Tensor] = {}  # of the last forward

    def forward(
        self,
        views: list[Float[Tensor, "batch 3 px px"]],
        progress: float,
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The variational loss and the regulariser, in nats; rows are benign and other in turn."""
        (images,) = views
        if len(images) < 2 or len(images) % 2:
            raise ValueError(
                f"a pass of pretrain.method vpu has {len(images)} patches: it needs two, four and "
                "so on, benign and other in turn; change pretrain.batch or pretrain.accumulate"
            )
        positive, unlabeled = images[0::2], images[1::2]
        share, order = self._mixing(keys, len(positive))
        mixed = share * unlabeled + (1 - share) * positive[order]
        embedding = self.encoder(torch.cat([positive, unlabeled, mixed]))
        log_phi = F.log_softmax(self.classifier(F.relu(embedding)).float(), dim=1)[:, 1]
        of_positive, of_unlabeled, of_mixed = log_phi.chunk(3)
        target = mixed_log_target(of_unlabeled, share)
        variational, regulariser = vpu_loss(
            of_positive, of_unlabeled, of_mixed, target, self.params.mixup_weight
        )
        self._seen = {
            "embedding": embedding[: len(images)].detach(),
            "phi_benign": of_positive.detach().exp().mean(),
            "phi_unlabeled": of_unlabeled.detach().exp().mean(),
            "regulariser": regulariser.detach(),
        }
        return variational + regulariser

    def _mixing(
        self, keys: Int64[Tensor, " batch"], count: int
    ) -> tuple[float, Int64[Tensor, "*"]]:
        """A pass's share of the unlabelled, and which benign patch each meets; from its keys."""
        rng = np.random.default_rng([_FOR_MIXING, *keys.numpy().view(np.uint64).tolist()])
        share = float(rng.beta(self.params.mixup_alpha, self.params.mixup_alpha))
        return share, torch.from_numpy(rng.permutation(count))

    def after_backward(self, progress: float) -> None:
        """Nothing to do."""

    def after_step(self, progress: float) -> None:
        """Nothing follows."""

    def monitor(self, progress: float) -> dict[str, float]:
        """Spread of the embeddings, and the mean probability of benign in either kind."""
        seen = dict(self._seen)
        found = {"embedding_std": _health.embedding_std(seen.pop("embedding"))}
        return found | {name: value.item() for name, value in seen.items()}


def build(encoder: nn.Module, params: Params, image_px: int) -> VPU:
    """VPU around an encoder."""
    return VPU(encoder, params, image_px)
