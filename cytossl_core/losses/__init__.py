"""The losses of the self-supervised methods, each checked against its printed algorithm."""

from cytossl_core.losses.dino import DINOLoss

__all__ = ["DINOLoss"]
