"""What is looked at before a pretraining run begins: settings and views that do not go together."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common import cohort
from stages.common.training import PretrainParams
from stages.common.views import ViewPolicy


def check_views(settings: PretrainParams, policies: list[ViewPolicy]) -> None:
    """Refuse views that tokens do not fill.

    Raises:
        ValueError: see above.
    """
    for policy in policies:
        if policy.views and policy.crop_px % max(settings.token_px, 1):
            raise ValueError(
                f"params.yaml: pretrain.{settings.method} asks for views of {policy.crop_px} px: "
                f"they must be a multiple of pretrain.token_px, {settings.token_px}"
            )


def check_encoder(settings: PretrainParams, encoder: nn.Module) -> None:
    """Refuse what would count a batch norm's statistics twice.

    Raises:
        ValueError: see above.
    """
    norms = any(isinstance(one, _BatchNorm) for one in encoder.modules())
    if settings.gradient_checkpointing and norms:
        raise ValueError(
            f"params.yaml: pretrain.gradient_checkpointing is true: {settings.backbone} has batch "
            "norms, whose running statistics would move twice a step; set it to false and raise "
            "pretrain.accumulate"
        )


def check_compile(settings: PretrainParams, of_method: Any) -> None:
    """Refuse to compile an encoder whose tokens are to be masked.

    Raises:
        ValueError: see above.
    """
    masking = getattr(of_method, "ibot", None)
    if settings.compile and masking and masking.weight:
        raise ValueError(
            f"params.yaml: pretrain.compile is true and pretrain.{settings.method}.ibot.weight is "
            f"{masking.weight}: compiled encoders take no mask tokens, set one to false or 0"
        )


def check_spread(settings: PretrainParams, of_method: Any) -> None:
    """Refuse KoLeo where no patch has a neighbour.

    Raises:
        ValueError: see above.
    """
    weight = getattr(of_method, "koleo_weight", 0)
    if weight and settings.batch // settings.accumulate < 2:
        raise ValueError(
            f"params.yaml: pretrain.{settings.method}.koleo_weight is {weight}: KoLeo compares the "
            f"patches of a pass, and pretrain.batch {settings.batch} over pretrain.accumulate "
            f"{settings.accumulate} leaves one; lower accumulate, or set koleo_weight to 0"
        )


def check_batch(settings: PretrainParams, views: int, devices: int) -> None:
    """Refuse a batch that the views cannot fill, or that cannot be dealt out evenly.

    Raises:
        ValueError: see above.
    """
    if not views:
        raise ValueError(
            "the perturb stage made no views of the slides that train: add slides or patches "
            "(tile), or choose other pretrain.splits"
        )
    if views < settings.batch:
        raise ValueError(
            f"params.yaml: pretrain.batch is {settings.batch}: the perturb stage made {views} "
            "views and a batch must not be larger; lower it or add patches (tile)"
        )
    shares = devices * settings.accumulate
    if settings.batch % shares:
        near = max(round(settings.batch / shares), 1) * shares
        raise ValueError(
            f"params.yaml: pretrain.batch is {settings.batch}: it must be a multiple of {shares}, "
            f"{devices} processes x {settings.accumulate} passes (accumulate), for example {near}"
        )


def check_pairs(settings: PretrainParams, devices: int) -> None:
    """Refuse what would part benign patches from the others that they are learned with.

    Raises:
        ValueError: see above.
    """
    if devices > 1:
        raise ValueError(
            f"pretrain.method {settings.method} runs in one process, and there are {devices}: "
            "start it without torchrun"
        )
    if settings.batch % (2 * settings.accumulate):
        raise ValueError(
            f"params.yaml: pretrain.batch is {settings.batch}: for pretrain.method "
            f"{settings.method} it must be a multiple of {2 * settings.accumulate}, two for each "
            "pass (accumulate)"
        )
    if "train" not in settings.splits:
        raise ValueError(
            f"params.yaml: pretrain.splits is {list(settings.splits)}: pretrain.method "
            f"{settings.method} learns from train slides"
        )


def slides_of(settings: PretrainParams, source: Path) -> set[str] | None:
    """Ids of the slides whose patches train; None: all of them.

    Raises:
        FileNotFoundError: the cohort stage has not run.
    """
    if set(settings.splits) == set(cohort.SPLITS):
        return None
    return {row.slide_id for row in cohort.read_rows(source) if row.split in settings.splits}
