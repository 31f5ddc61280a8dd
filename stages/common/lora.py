"""LoRA: adapters beside the frozen weights of a vision transformer. The only peft import.

Trained are the adapters of every block's projections and the tables of relative positions, which
no base weights have; both together are what is saved.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from stages.common.spec import LoraParams
from stages.common.weights import check

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


def add(model: nn.Module, settings: LoraParams) -> None:
    """Freeze `model` and put adapters into it that add nothing yet.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model is no vision transformer.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"adapter is lora and {type(model).__name__} has no attention: choose a vision "
            "transformer, or adapter none"
        )
    peft = _peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=TARGETS,
    )
    peft.inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(_trained(name))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, under plain names: blocks.<n>.attn.qkv.lora_A.weight, ..."""
    return {
        name.replace(".default.", "."): value
        for name, value in model.state_dict().items()
        if _trained(name)
    }


def give(model: nn.Module, found: dict[str, Tensor], what: str) -> None:
    """Give a model with adapters those of `found`.

    Raises:
        ValueError: they are not those of this model.
    """
    own = adapters(model)
    check(found, own, what)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def merge(model: nn.Module) -> nn.Module:
    """Add what the adapters add to the weights themselves; a plain encoder again."""
    layers = [
        it for it in model.named_modules() if isinstance(it[1], _peft().tuners.lora.LoraLayer)
    ]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    return model.requires_grad_(True)


def _trained(name: str) -> bool:
    return ".lora_" in name or ".table_" in name


def _peft() -> ModuleType:
    try:
        import peft  # here: it takes seconds, and only adapters need it
    except ImportError:
        raise ImportError(
            "adapters need peft, which is not installed: pip install '.[lora]'"
        ) from None
    return peft
