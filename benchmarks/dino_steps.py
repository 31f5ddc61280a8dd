"""A step of DINO three ways: ours, of lightly's modules, and as the official code is written.

All see the same views and do the same work, which `check_alike` proves: copies of one network,
equal losses over some steps. Only how it is written differs.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.common import architectures, encoders, optimizer
from stages.common.spec import EncoderSpec
from stages.methods import dino

Views = list[Tensor]
CLIP_NORM, LEARNING_RATE, HALFWAY = 3.0, 5e-4, 0.5  # the prototypes are trained by then
STEPS_ALIKE, TOLERANCE = 3, 1e-4


@dataclass(frozen=True)
class Contender:
    """What a step calls, in this order."""

    forward: Callable[[Views], Tensor]  # the loss
    clip: Callable[[], Tensor | None]  # gradients, tensor by tensor
    after_backward: Callable[[], object]  # the prototypes may be frozen
    adam: torch.optim.Optimizer
    after_step: Callable[[], object]  # the teacher follows
    network: nn.Module  # student, teacher and loss

    def step(self, views: Views) -> float:
        """One step; the loss, for which the device is waited for once, as every loop does."""
        device = views[0].device.type
        with torch.autocast(device, torch.bfloat16, device == "cuda"):
            loss = self.forward(views)
        loss.backward()
        norm = self.clip()
        value = torch.stack([loss.detach(), loss.new_zeros(()) if norm is None else norm]).tolist()
        self.after_backward()
        self.adam.step()
        self.after_step()
        self.adam.zero_grad()
        return value[0]

    def held_mib(self) -> float:
        """Memory of what outlives a step: both networks, their centers, Adam's averages."""
        of_adam = [v for state in self.adam.state.values() for v in state.values()]
        kept = [*self.network.state_dict().values(), *of_adam]
        return sum(v.numel() * v.element_size() for v in kept if torch.is_tensor(v)) / 2**20


def ours(spec: EncoderSpec, settings: dino.Params, device: str) -> Contender:
    """The method and the optimizer of stages.pretrain."""
    method = dino.build(encoders.build(spec), settings, spec.image_px).to(device).train()
    trained = [value for value in method.parameters() if value.requires_grad]
    keys = torch.arange(1)  # only masked tokens, which are off, draw from them
    return Contender(
        forward=lambda views: method(views, HALFWAY, keys),
        clip=lambda: optimizer.clip_each(trained, CLIP_NORM),
        after_backward=lambda: method.after_backward(HALFWAY),
        adam=_adam(trained),
        after_step=lambda: method.after_step(HALFWAY),
        network=method,
    )


def lightly(model: Contender, spec: EncoderSpec) -> Contender:
    """As lightly's documentation writes it (examples/pytorch/dino.py), begun where `model` is.

    View after view through backbone and head. Clipping and optimizer are ours.
    """
    found, modules = _imported("lightly.loss"), _imported("lightly.models.modules")
    update_momentum = _imported("lightly.models.utils").update_momentum
    method, settings = model.network, model.network.params
    device = next(method.parameters()).device
    heads = [_lightly_head(modules, of.head) for of in (method.student, method.teacher)]
    network = nn.ModuleDict(
        {
            "student_backbone": _plain(method.student.encoder, spec),
            "student_head": heads[0],
            "teacher_backbone": _plain(method.teacher.encoder, spec).requires_grad_(False),
            "teacher_head": heads[1].requires_grad_(False),
            "loss": found.DINOLoss(
                settings.prototypes,
                student_temp=settings.student_temperature,
                center_momentum=settings.center_momentum,
            ),
        }
    ).to(device)
    trained = [value for value in network.parameters() if value.requires_grad]
    student = network["student_backbone"], network["student_head"]
    teacher = network["teacher_backbone"], network["teacher_head"]
    temperature, momentum = method.teacher_temperature(HALFWAY), method.momentum(HALFWAY)

    def forward(views: Views) -> Tensor:
        wanted = [teacher[1](teacher[0](view).flatten(1)) for view in views[: dino.TEACHER_VIEWS]]
        said = [student[1](student[0](view).flatten(1)) for view in views]
        return network["loss"](wanted, said, teacher_temp=temperature)

    def follow() -> None:
        for leader, follower in zip(student, teacher, strict=True):
            update_momentum(leader, follower, m=momentum)

    return Contender(
        forward=forward,
        clip=lambda: optimizer.clip_each(trained, CLIP_NORM),
        after_backward=lambda: student[1].cancel_last_layer_gradients(current_epoch=1),
        adam=_adam(trained),
        after_step=follow,
        network=network,
    )


def official(model: Contender, spec: EncoderSpec) -> Contender:
    """The loop of facebookresearch/dino around our networks, begun where `model` is.

    One pass for each resolution, pairs of views in a double loop, parameter after parameter in
    clipping and teacher, Adam unfused.
    """
    method, settings = model.network, model.network.params
    network = nn.ModuleDict(
        {
            "student": dino.Network(_plain(method.student.encoder, spec), settings),
            "teacher": dino.Network(_plain(method.teacher.encoder, spec), settings),
        }
    ).to(next(method.parameters()).device)
    for name in ("student", "teacher"):
        network[name].head.load_state_dict(getattr(method, name).head.state_dict())
    network["teacher"].requires_grad_(False)
    network.register_buffer("center", method.loss.center.clone())
    trained = [value for value in network.parameters() if value.requires_grad]
    temperature, momentum = method.teacher_temperature(HALFWAY), method.momentum(HALFWAY)

    def forward(views: Views) -> Tensor:
        wanted = network["teacher"](views[: dino.TEACHER_VIEWS])[0]
        said = network["student"](views)[0]
        return _official_loss(network, said, wanted, temperature, settings)

    def follow() -> None:
        pairs = zip(network["student"].parameters(), network["teacher"].parameters(), strict=True)
        with torch.no_grad():
            for leader, follower in pairs:
                follower.mul_(momentum).add_((1 - momentum) * leader.detach())

    rates = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    return Contender(
        forward=forward,
        clip=lambda: _clip_in_turn(trained),
        after_backward=lambda: None,
        adam=torch.optim.Adam(trained, **rates),
        after_step=follow,
        network=network,
    )


def _official_loss(
    network: nn.Module, said: Tensor, wanted: Tensor, temperature: float, settings: dino.Params
) -> Tensor:
    targets = F.softmax((wanted - network.center) / temperature, dim=-1).detach()
    terms = []
    for first, target in enumerate(targets):
        for second, view in enumerate(said / settings.student_temperature):
            if first != second:
                terms.append(torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean())
    with torch.no_grad():
        mean, kept = wanted.flatten(0, 1).float().mean(0), settings.center_momentum
        network.center.copy_(network.center * kept + mean * (1 - kept))
    return sum(terms) / len(terms)


def _clip_in_turn(trained: list[Tensor]) -> None:
    for value in trained:
        if value.grad is not None:
            norm = value.grad.norm(2)
            norm.item()  # the official loop notes it, and so waits for the device
            scale = CLIP_NORM / (norm + 1e-6)
            if scale < 1:
                value.grad.mul_(scale)


def check_alike(contenders: dict[str, Contender], views: Views) -> None:
    """Take some steps with each.

    Raises:
        ValueError: their losses differ, so that they do not do the same work.
    """
    losses = {
        name: torch.tensor([one.step(views) for _ in range(STEPS_ALIKE)])
        for name, one in contenders.items()
    }
    (first, expected), *others = losses.items()
    for name, found in others:
        if not torch.allclose(found, expected, rtol=TOLERANCE, atol=0):
            raise ValueError(
                f"{name} has losses {found.tolist()} and {first} {expected.tolist()}: they must "
                "agree, or the times below compare different work"
            )


def _adam(trained: list[Tensor]) -> torch.optim.Optimizer:
    adam = optimizer.build(trained, "adam")
    optimizer.schedule(adam, LEARNING_RATE, 0.0)
    return adam


def _plain(encoder: nn.Module, spec: EncoderSpec) -> nn.Module:
    """Timm's own model with the weights of `encoder`, whose attention must be dense."""
    model = timm.create_model(**architectures.arguments(spec))
    model.load_state_dict(encoder.state_dict())
    return model.train(encoder.training)


def _lightly_head(modules: object, head: nn.Module) -> nn.Module:
    """Lightly's head with the weights of ours."""
    first, _, _, _, third = head.mlp
    outputs = len(head.prototypes.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its weight_norm
        made = modules.DINOProjectionHead(
            first.in_features, first.out_features, third.out_features, outputs, freeze_last_layer=1
        )
    made.layers.load_state_dict(head.mlp.state_dict())
    made.last_layer.weight_v.data.copy_(head.prototypes.weight.data)
    return made


def _imported(name: str) -> object:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # else it asks a server at import
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "lightly is not installed, which this benchmark compares with: install the extra, "
            "pip install 'cytossl[benchmark]'"
        ) from error
