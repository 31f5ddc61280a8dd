"""DINO's settings: section pretrain.dino of params.yaml."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Literal

from stages.common.views import BLUR_PX
from stages.methods._checks import require, require_views
from stages.methods._masked import Masking

logger = logging.getLogger(__name__)

AUTO = "auto"
# Prototypes for up to so many patches; for more there are `_MOST`.
_BY_PATCHES = (
    (20_000, 1024),
    (50_000, 2048),
    (100_000, 4096),
    (200_000, 16384),
    (500_000, 32768),
)
_MOST = 65536


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
    prototypes: int | Literal["auto"]  # outputs of the head (65536); auto: see `fitted`
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
        if self.prototypes != AUTO:
            require("dino", "prototypes", self.prototypes, 2, math.inf)
        require("dino", "local_px", self.local_px, BLUR_PX, math.inf)
        require_views("dino", self)
        for name in ("hidden_dim", "bottleneck_dim"):
            require("dino", name, getattr(self, name), 1, math.inf)
        for name in ("student_temperature", "teacher_temperature_start", "teacher_temperature"):
            require("dino", name, getattr(self, name), 1e-6, math.inf)
        require("dino", "center_momentum", self.center_momentum, 0, 0.9999)  # 1 would never learn
        for name in ("momentum", "teacher_temperature_warmup", "freeze_prototypes"):
            require("dino", name, getattr(self, name), 0, 1)
        for name in ("local_views", "koleo_weight"):
            require("dino", name, getattr(self, name), 0, math.inf)

    def fitted(self, patches: int) -> "Params":
        """The same with as many prototypes as go with a number of patches, if that is left to us.

        Source:
            lightly-train's table for DINO, by the number of images.
        """
        if self.prototypes != AUTO:
            return self
        chosen = next((count for most, count in _BY_PATCHES if patches <= most), _MOST)
        logger.info("pretrain.dino.prototypes: %d, for %d patches", chosen, patches)
        return dataclasses.replace(self, prototypes=chosen)
