"""The losses of methods and heads, each checked against its printed algorithm."""

from cytossl_core.losses.byol import byol_loss
from cytossl_core.losses.dino import DINOLoss
from cytossl_core.losses.ibot import IBOTLoss
from cytossl_core.losses.koleo import koleo_loss
from cytossl_core.losses.mocov3 import mocov3_loss
from cytossl_core.losses.simclr import nt_xent
from cytossl_core.losses.smooth_svm import smooth_top1_svm
from cytossl_core.losses.vpu import mixed_log_target, vpu_loss

__all__ = [
    "DINOLoss",
    "IBOTLoss",
    "byol_loss",
    "koleo_loss",
    "mixed_log_target",
    "mocov3_loss",
    "nt_xent",
    "smooth_top1_svm",
    "vpu_loss",
]
