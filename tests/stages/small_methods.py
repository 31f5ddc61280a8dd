"""Every method around a tiny transformer, and the views that it asks for."""

import torch

from stages.common import encoders, params, plugins
from stages.common.chance import keys_of
from stages.methods._masked import Masking

PX, BATCH = 32, 5
KEYS = keys_of(3, 1, torch.arange(BATCH))
METHODS = ["simclr", "mocov3", "byol", "dino", "dino with tokens"]


def section(name: str):
    module = plugins.load("methods", name.split()[0])
    values = params.load(module.Params, f"pretrain.{name.split()[0]}")
    smaller = {"hidden_dim": 23}
    if name.startswith("dino"):
        smaller |= {"prototypes": 13, "bottleneck_dim": 11, "local_px": 16}
    else:
        smaller |= {"projection_dim": 9}
    if name == "dino with tokens":
        smaller |= {"ibot": Masking(0.7, 0.9, (0.1, 0.5)), "koleo_weight": 0.1}
    return module, type(values)(**{**vars(values), **smaller})


def build(name: str, drop_path: float = 0.0, **changes):
    module, values = section(name)
    values = type(values)(**{**vars(values), **changes})
    torch.manual_seed(5)
    mean_std = (encoders.MEAN, encoders.STD)
    spec = encoders.EncoderSpec("test_vit", PX, 8, 3, "qkv", *mean_std, 61, 0.5)
    return module.build(encoders.build(spec, drop_path), values, PX).train()


def views(method, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sides = [policy.crop_px for policy in method.view_policies for _ in range(policy.views)]
    return [torch.randn(BATCH, 3, side, side, generator=draw) for side in sides]


def step(method, adam, progress: float, seed: int) -> float:
    loss = method(views(method, seed), progress, KEYS)
    loss.backward()
    method.after_backward(progress)
    adam.step()
    adam.zero_grad()
    method.after_step(progress)
    return loss.item()


def optimizer_of(method) -> torch.optim.Adam:
    return torch.optim.Adam([value for value in method.parameters() if value.requires_grad], 1e-3)
