"""DINO's networks: the head as published, the average, and who sees which view."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.common import encoders, plugins
from stages.methods import dino
from stages.methods._masked import Masking
from tests.definitions import dino as definition

PARAMS = dino.Params(
    local_views=3,
    local_px=16,
    global_scale=(0.4, 1.0),
    local_scale=(0.05, 0.4),
    rotation_degrees=180.0,
    flip=0.5,
    jitter=0.8,
    gray=0.2,
    blur=(1.0, 0.1, 0.5),
    solarize=0.2,
    prototypes=13,
    hidden_dim=31,
    bottleneck_dim=11,
    student_temperature=0.1,
    teacher_temperature_start=0.04,
    teacher_temperature=0.07,
    teacher_temperature_warmup=0.3,
    center_momentum=0.9,
    momentum=0.99,
    freeze_prototypes=0.1,
    koleo_weight=0.0,
    ibot=Masking(weight=0.0, chance=0.5, share=(0.1, 0.5)),
)
GLOBAL_PX, BATCH = 32, 5
KEYS = torch.arange(BATCH)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def changed(**values) -> dino.Params:
    return dataclasses.replace(PARAMS, **values)


def build(params: dino.Params = PARAMS, drop_path: float = 0.0) -> dino.DINO:
    torch.manual_seed(5)
    mean_std = (encoders.MEAN, encoders.STD)
    spec = encoders.EncoderSpec("test_vit", GLOBAL_PX, 8, 3, "qkv", *mean_std, 61, 0.5)
    method = plugins.load("methods", "dino").build(
        encoders.build(spec, drop_path), params, GLOBAL_PX
    )
    return method.train()


def views(method: dino.DINO, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sides = [policy.crop_px for policy in method.view_policies for _ in range(policy.views)]
    return [torch.randn(BATCH, 3, side, side, generator=draw) for side in sides]


def test_head_begins_as_published():
    torch.manual_seed(0)
    head = dino.Head(dim=192, hidden_dim=512, bottleneck_dim=256, prototypes=2048)
    for layer in head.mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not layer.bias.any()
    # nn.Linear's own: uniform within 1 / sqrt(256).
    bound = 1 / math.sqrt(256)
    assert bound * 0.999 < head.prototypes.weight.abs().max() <= bound
    assert head.prototypes.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert head.prototypes.bias is None
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU] * 2 + [nn.Linear]


def test_head_equals_torchs_weight_norm_with_its_gain_frozen_at_1():
    head = build().student.head
    last = nn.utils.parametrizations.weight_norm(copy.deepcopy(head.prototypes))
    last.parametrizations.weight.original0.data.fill_(1)
    embedding = torch.randn(7, 64)
    wanted = last(F.normalize(head.mlp(embedding), dim=-1))
    torch.testing.assert_close(head(embedding), wanted)
    head(embedding).square().sum().backward(retain_graph=True)
    wanted.square().sum().backward()
    direction = last.parametrizations.weight.original1.grad
    torch.testing.assert_close(head.prototypes.weight.grad, direction)


def test_length_of_a_prototype_is_no_part_of_the_function():
    head = build().student.head
    embedding = torch.randn(7, 64)
    before = head(embedding)
    with torch.no_grad():
        head.prototypes.weight *= torch.rand(13, 1) + 0.5
    torch.testing.assert_close(head(embedding), before)
    assert before.abs().max() <= 1


def test_loss_equals_the_printed_algorithm_view_by_view():
    method = build()
    with torch.no_grad():
        method.loss.center.copy_(torch.randn(13) * 0.1)
    center, seen = method.loss.center.clone(), views(method)
    got = method(seen, 0.1, KEYS)
    method.after_backward(0.1)
    with torch.no_grad():
        student = [method.student.head(method.student.encoder(view)) for view in seen]
        teacher = [method.teacher.head(method.teacher.encoder(view)) for view in seen[:2]]
        wanted = definition.loss(student, teacher, center, 0.1, 0.04 + 0.03 / 3)
        moved = definition.moved_center(center, torch.stack(teacher), 0.9)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(method.loss.center, moved)


def test_encoder_runs_once_for_each_resolution():
    method = build()
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name in ("student", "teacher"):
        encoder = getattr(method, name).encoder
        encoder.register_forward_pre_hook(
            lambda _, inputs, name=name: calls.append((name, tuple(inputs[0].shape)))
        )
    method(views(method), 0.0, KEYS)
    assert sorted(calls) == [
        ("student", (2 * BATCH, 3, 32, 32)),
        ("student", (3 * BATCH, 3, 16, 16)),
        ("teacher", (2 * BATCH, 3, 32, 32)),
    ]


def test_teacher_is_a_copy_that_no_gradient_reaches():
    method = build()
    method(views(method), 0.5, KEYS).backward()
    pairs = zip(method.teacher.parameters(), method.student.parameters(), strict=True)
    for teacher, student in pairs:
        assert torch.equal(teacher, student)
        assert teacher.data_ptr() != student.data_ptr()
        assert teacher.grad is None
        assert not teacher.requires_grad
    assert method.encoder is method.teacher.encoder
    assert any(value.grad.any() for value in method.student.encoder.parameters())


def test_teacher_is_the_average_that_a_loop_gives():
    method = build()
    wanted = [value.clone() for value in method.teacher.parameters()]
    for progress in (0.0, 0.25, 0.5):
        keep = 1 - 0.01 * (1 + math.cos(math.pi * progress)) / 2
        with torch.no_grad():
            for at, student in enumerate(method.student.parameters()):
                student.add_(torch.randn(student.shape))
                wanted[at] = keep * wanted[at] + (1 - keep) * student
        method.after_step(progress)
    for teacher, value in zip(method.teacher.parameters(), wanted, strict=True):
        torch.testing.assert_close(teacher, value)


def test_teacher_drops_no_paths_in_training():
    method = build(drop_path=0.9)
    seen = views(method)
    with torch.no_grad():
        student = [method.student(seen)[0] for _ in range(2)]
        teacher = [method.teacher(seen[:2])[0] for _ in range(2)]
    assert not torch.equal(*student)
    assert torch.equal(*teacher)


def test_prototypes_stay_as_drawn_in_the_first_part_of_the_run():
    method = build()
    weight = method.student.head.prototypes.weight
    for progress, frozen in ((0.0, True), (0.0999, True), (0.1, False), (0.9, False)):
        method(views(method), progress, KEYS).backward()
        method.after_backward(progress)
        assert (weight.grad is None) == frozen
        assert method.student.head.mlp[4].weight.grad is not None
        method.zero_grad()


def test_checkpoint_holds_center_and_both_networks():
    method, other = build(), build(changed())
    method(views(method), 0.0, KEYS)
    method.after_backward(0.0)
    method.after_step(0.0)
    assert method.loss.center.any()
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.loss.center, method.loss.center)
    assert torch.equal(other(views(other, 1), 0.2, KEYS), method(views(method, 1), 0.2, KEYS))


def test_views_are_two_global_kinds_and_the_local_ones():
    first, second, local = build().view_policies
    assert [first.views, second.views, local.views] == [1, 1, 3]
    assert [first.crop_px, second.crop_px, local.crop_px] == [32, 32, 16]
    assert [first.blur, second.blur, local.blur] == [1.0, 0.1, 0.5]
    assert [first.solarize, second.solarize, local.solarize] == [0.0, 0.2, 0.0]


def test_trains_without_local_views():
    method = build(changed(local_views=0))
    assert len(views(method)) == 2
    assert math.isfinite(method(views(method), 0.0, KEYS).item())


def test_monitor_tells_collapse_from_health():
    method = build()
    method._seen.note(0.0, BATCH, torch.ones(2 * BATCH, 13), torch.ones(2 * BATCH, 64))
    collapsed = method.monitor(0.0)
    assert collapsed["embedding_std"] == pytest.approx(0, abs=1e-6)
    assert collapsed["teacher_entropy"] == pytest.approx(1)
    one_each = 9 * F.one_hot(torch.arange(2 * 13) % 13, 13)
    method._seen.note(0.1, 13, one_each, torch.randn(4000, 64))
    healthy = method.monitor(0.0)
    assert healthy["embedding_std"] == pytest.approx(1, abs=0.02)
    assert healthy["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert healthy["prototypes_entropy"] == pytest.approx(1)
    one_for_all = 9 * F.one_hot(torch.full((26,), 4), 13)
    method._seen.note(0.2, 13, one_for_all, torch.randn(26, 64))
    assert method.monitor(0.0)["prototypes_entropy"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prototypes", 0),
        ("local_views", -1),
        ("momentum", 1.5),
        ("teacher_temperature", 0.0),
        ("teacher_temperature_warmup", -0.1),
        ("student_temperature", 0.0),
        ("center_momentum", 1.0),
    ],
)
def test_rejects_what_no_run_can_have(name, value):
    with pytest.raises(ValueError, match=rf"pretrain\.dino\.{name} is {value}: it must be"):
        changed(**{name: value})
