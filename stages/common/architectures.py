"""Architectures: timm's networks with our attention, and the weights that timm's hub has for them.

The only timm import. Vision transformers and ResNets by timm's names, and Prov-GigaPath by its hub
id: it is timm's vit_giant_patch14_dinov2 with arguments of its own, which are written down here so
that it is built without a network.
"""

import difflib
import logging
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import load_state_dict_from_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cytossl_core.attention import with_sr_attention
from cytossl_core.cnn import PatchCNN
from stages.common.spec import EncoderSpec

logger = logging.getLogger(__name__)

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
GIGAPATH = "hf_hub:prov-gigapath/prov-gigapath"
# config.json of that hub repository
PUBLISHED = {
    GIGAPATH: {
        "model_name": "vit_giant_patch14_dinov2",
        "embed_dim": 1536,
        "depth": 40,
        "num_heads": 24,
        "init_values": 1e-5,
        "mlp_ratio": 5.33334,
    }
}
CNNS = {"vpu_cnn_384": 384, "vpu_cnn_768": 768}  # LESS's, by the length of an embedding
GIGAPATH_TERMS = (
    "Prov-GigaPath's own terms: for research, not for clinical use "
    "(https://huggingface.co/prov-gigapath/prov-gigapath)"
)


def has_tokens(architecture: str) -> bool:
    """Whether it is a vision transformer.

    Raises:
        ValueError: timm has no such vision transformer or ResNet.
    """
    name = architecture.partition(".")[0]
    vits, resnets = (timm.list_models(module=it) for it in ("vision_transformer", "resnet"))
    if architecture in CNNS:
        return False
    if name not in [*vits, *resnets, *PUBLISHED]:
        near = difflib.get_close_matches(name, [*vits, *resnets], 3) or ["vit_tiny_patch16_224"]
        raise ValueError(
            f"{architecture!r} is no vision transformer or ResNet of timm: take for example "
            f"{', '.join(near)}, {GIGAPATH}, or {', '.join(CNNS)}"
        )
    if name != architecture:
        _check_tag(architecture, name)
    return name not in resnets


def _check_tag(architecture: str, name: str) -> None:
    tagged = timm.list_models(f"{name}.*", pretrained=True)
    if architecture not in tagged:
        raise ValueError(
            f"timm has no weights called {architecture}: take {name}, which has a default, or one "
            f"of {', '.join(tagged) or 'none'}"
        )


def arguments(spec: EncoderSpec) -> dict[str, Any]:
    """What timm.create_model is called with; of a CNN of ours what PatchCNN is.

    Raises:
        ValueError: the architecture is unknown, or does not go with the spec's other settings.
    """
    made = PUBLISHED.get(spec.architecture, {"model_name": spec.architecture})
    if not has_tokens(spec.architecture):
        _check_without_tokens(spec)
        if spec.architecture in CNNS:
            return {"dim": CNNS[spec.architecture], "image_px": spec.image_px}
        return {**made, "num_classes": 0, "global_pool": "avg"}
    if spec.token_px < 1 or spec.image_px % spec.token_px:
        raise ValueError(
            f"an image of {spec.image_px} px is no whole number of tokens of {spec.token_px} px: "
            "choose a multiple"
        )
    grid = {"img_size": spec.image_px, "patch_size": spec.token_px, "dynamic_img_size": True}
    return {**made, **grid, "num_classes": 0, "global_pool": "token"}


def _check_without_tokens(spec: EncoderSpec) -> None:
    for name, wanted in (("token_px", 0), ("sparse_topk", 0), ("irpe", "none")):
        if getattr(spec, name) != wanted:
            raise ValueError(
                f"{name} is {getattr(spec, name)} and {spec.architecture} has no attention and no "
                f"tokens: set {name} to {wanted}, or choose a vision transformer"
            )


def attention(spec: EncoderSpec) -> dict[str, Any] | None:
    """What with_sr_attention is called with; None where there is no attention."""
    if not has_tokens(spec.architecture):
        return None
    return {"topk": spec.sparse_topk or None, "irpe": spec.irpe}


def build(spec: EncoderSpec, drop_path: float = 0.0, empty: bool = False) -> nn.Module:
    """An untrained encoder: images [batch, 3, px, px] to embeddings [batch, num_features].

    A vision transformer's embedding is its class token, and any px that is a multiple of `token_px`
    runs through it, absolute positions being resampled; a ResNet's is the mean of its last map.

    Args:
        spec: What to build.
        drop_path: Chance that a sample skips a residual branch in training, rising to this value
            at the last block.
        empty: Whether a vision transformer's weights may stay unmade (on torch's meta device), all
            being loaded next.

    Raises:
        ValueError: timm knows no such architecture, or the spec's settings do not go together.
    """
    made, swap = arguments(spec), attention(spec)
    if spec.architecture in CNNS:
        return PatchCNN(**made)
    try:
        with torch.device("meta" if empty and swap else "cpu"):
            model = timm.create_model(**made, drop_path_rate=drop_path)
    except AssertionError:
        raise ValueError(
            f"{spec.architecture} has no class token, which is the embedding here: choose another "
            "vision transformer"
        ) from None
    return with_sr_attention(model, **swap) if swap else model


class SharedDropPath(DropPath):
    """timm's DropPath, for one of several processes: a row is dropped as it would be in one.

    Rows are dealt out to the processes one by one (`Ranks.share`), and all draw the numbers of all
    rows from generators with equal seeds.
    """

    def __init__(self, layer: DropPath, rank: int, count: int) -> None:
        super().__init__(layer.drop_prob, layer.scale_by_keep)
        self.rank, self.count = rank, count

    def forward(self, rows: Tensor) -> Tensor:
        """Zero a row of [row, ...], or divide it by the chance of being kept."""
        if not self.training or not self.drop_prob:
            return rows
        kept = 1 - self.drop_prob
        drawn = rows.new_empty(len(rows) * self.count).bernoulli_(kept)[self.rank :: self.count]
        scale = kept if self.scale_by_keep else 1.0
        return rows * (drawn / scale).view(-1, *[1] * (rows.ndim - 1))


def share_dropped_paths(model: nn.Module, rank: int, count: int) -> nn.Module:
    """Let each of `count` processes drop the paths that one process alone would drop."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, DropPath):
                setattr(parent, name, SharedDropPath(layer, rank, count))
    return model


def normalisation(architecture: str, released: bool) -> tuple[tuple, tuple]:
    """Mean and std of the images: ImageNet's, or those that the released weights expect."""
    found = timm.get_pretrained_cfg(architecture) if released and has_tokens(architecture) else None
    if found is None:
        return MEAN, STD
    return tuple(found.mean), tuple(found.std)


def licence(architecture: str) -> str:
    """Licence of the weights on the hub."""
    if architecture == GIGAPATH:
        return GIGAPATH_TERMS
    found = timm.get_pretrained_cfg(architecture)
    return (found and found.license) or "not stated by timm"


def from_hub(architecture: str) -> dict[str, Tensor]:
    """The weights that timm's hub has for an architecture.

    Safetensors if the hub has them; else torch's own file, of which only tensors are read.

    Raises:
        OSError: the hub was not reached, or refused; the message says what to do.
        ValueError: there are no weights for this architecture.
    """
    place = architecture.removeprefix("hf_hub:")
    if architecture not in PUBLISHED:
        found = timm.get_pretrained_cfg(architecture)
        place = found.hf_hub_id if found else None
    if not place:
        raise ValueError(
            f"timm's hub has no weights for {architecture}: set `weights` to none or to a "
            "safetensors file"
        )
    logger.info("weights of %s: those of https://huggingface.co/%s", architecture, place)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of its retries
    try:
        return load_state_dict_from_hf(place)
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        raise OSError(
            f"the weights of {architecture} were not had from https://huggingface.co/{place}: "
            f"{first} Accept the terms on that page if it has some and set HF_TOKEN to a token of "
            "yours; without a network, fetch the safetensors file elsewhere and set "
            "`weights` to its path (HF_HUB_OFFLINE=1 spares the minute of retries)"
        ) from None


def adapted(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `model` names them, positions and patch embedding resampled to its sizes."""
    if not hasattr(model, "patch_embed"):
        return found
    return checkpoint_filter_fn(found, model, interpolation="bicubic", antialias=True)
