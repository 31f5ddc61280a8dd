"""DINO's loss against the printed algorithm: values, gradients, and the center's order."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cytossl_core.losses import DINOLoss
from tests.definitions import dino as definition

VIEWS, BATCH, PROTOTYPES = 5, 3, 7


def outputs(views: int = VIEWS, batch: int = BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(views)
    shape = (views, batch, PROTOTYPES)
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = torch.randn((2, *shape[1:]), generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("views", [2, 3, 10])
def test_matches_definition_in_value_and_gradient(views):
    student, teacher = outputs(views)
    dino = DINOLoss(PROTOTYPES, student_temperature=0.2).double()
    dino.center.copy_(torch.linspace(-1, 1, PROTOTYPES))
    expected_of = student.clone().requires_grad_()
    expected = definition.loss(expected_of, teacher, dino.center.clone(), 0.2, 0.07)
    expected.backward()
    student.requires_grad_()
    got = dino(student, teacher, 0.07)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, expected_of.grad, rtol=1e-10, atol=1e-14)


def test_gradient_agrees_with_differences():
    student, teacher = outputs(3)
    dino = DINOLoss(PROTOTYPES, student_temperature=0.5).double().eval()
    assert torch.autograd.gradcheck(lambda s: dino(s, teacher, 0.5), student.requires_grad_())


def test_teacher_gets_no_gradient():
    student, teacher = outputs()
    DINOLoss(PROTOTYPES)(student.requires_grad_(), teacher.requires_grad_(), 0.04).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("prototypes", [1, 7, 4096, 65536])
def test_uniform_outputs_cost_ln_of_the_prototypes(prototypes):
    loss = DINOLoss(prototypes)(torch.zeros(4, 2, prototypes), torch.ones(2, 2, prototypes), 0.04)
    assert loss.item() == pytest.approx(math.log(prototypes), rel=1e-6)


def test_a_view_is_not_paired_with_itself():
    # Two views that agree across, each far from its own counterpart.
    one, two = torch.eye(2, dtype=torch.float64)[:, None] * 40
    loss = DINOLoss(2, 1.0).double()(torch.stack([two, one]), torch.stack([one, two]), 1.0)
    assert loss.item() < 1e-15


def test_views_after_the_second_may_swap_and_so_may_the_first_two_together():
    student, teacher = outputs()
    dino = DINOLoss(PROTOTYPES).double().eval()
    expected = dino(student, teacher, 0.05)
    torch.testing.assert_close(dino(student[[0, 1, 4, 3, 2]], teacher, 0.05), expected)
    torch.testing.assert_close(dino(student[[1, 0, 2, 3, 4]], teacher[[1, 0]], 0.05), expected)


def test_center_moves_after_the_loss_by_the_raw_outputs():
    student, teacher = outputs()
    dino = DINOLoss(PROTOTYPES, center_momentum=0.8).double()
    center = torch.zeros(PROTOTYPES, dtype=torch.float64)
    for step in range(3):
        got = dino(student + step, teacher + step, 0.06)
        expected = definition.loss(student + step, teacher + step, center, 0.1, 0.06)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        center = definition.moved_center(center, teacher + step, 0.8)
        torch.testing.assert_close(dino.center, center, rtol=1e-12, atol=1e-15)


def test_center_rests_in_evaluation_and_is_part_of_the_state():
    student, teacher = outputs()
    dino = DINOLoss(PROTOTYPES).double()
    dino(student, teacher, 0.04)
    before = dino.state_dict()["center"].clone()
    dino.eval()(student, teacher, 0.04)
    assert before.abs().min() > 0 and torch.equal(dino.center, before)
    assert [name for name, _ in dino.named_buffers()] == ["center"]


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_outputs_stay_finite_and_exact(scale):
    student = torch.zeros(3, 1, 4)
    student[:, :, 2] = scale
    teacher = student[:2].clone()
    dino = DINOLoss(4)
    assert dino(student.requires_grad_(), teacher, 0.04).item() == 0
    wrong = torch.zeros(3, 1, 4)
    wrong[:, :, 1] = 1e4
    loss = DINOLoss(4)(wrong.requires_grad_(), teacher, 0.04)
    loss.backward()
    assert loss.item() == pytest.approx(1e5, rel=1e-6) and wrong.grad.isfinite().all()


def test_computes_in_float32_inside_autocast():
    student, teacher = (side * 30 for side in outputs(dtype=torch.bfloat16))
    expected = DINOLoss(PROTOTYPES)(student.float(), teacher.float(), 0.04)
    dino = DINOLoss(PROTOTYPES)
    with torch.autocast("cpu", torch.bfloat16):
        got = dino(student.requires_grad_(), teacher, 0.04)
    assert got.dtype == dino.center.dtype == torch.float32 and torch.equal(got, expected)
    got.backward()
    assert student.grad.dtype == torch.bfloat16


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    student, teacher = outputs(batch=5)
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    dino = DINOLoss(PROTOTYPES).double()
    losses = [dino(student[:, rows], teacher[:, rows] + step, 0.04).item() for step in range(2)]
    torch.save({"center": dino.center, "losses": losses}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    student, teacher = outputs(batch=5)
    dino = DINOLoss(PROTOTYPES).double()
    for step in range(2):
        expected = dino(student, teacher + step, 0.04).item()
        shared = (2 * ranks[0]["losses"][step] + 3 * ranks[1]["losses"][step]) / 5
        assert shared == pytest.approx(expected, rel=1e-12)
    for rank in ranks:
        torch.testing.assert_close(rank["center"], dino.center, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_rejects_temperatures_that_are_not_positive(temperature):
    with pytest.raises(ValueError, match=f"student_temperature is {temperature}: .* above 0"):
        DINOLoss(PROTOTYPES, student_temperature=temperature)
    with pytest.raises(ValueError, match=f"teacher_temperature is {temperature}: .* above 0"):
        DINOLoss(PROTOTYPES)(*outputs(), temperature)


def test_rejects_wrong_settings():
    with pytest.raises(ValueError, match="prototypes is 0"):
        DINOLoss(0)
    with pytest.raises(ValueError, match="center_momentum is 1.0"):
        DINOLoss(3, center_momentum=1.0)


def test_rejects_wrong_views_and_prototypes():
    student, teacher = outputs()
    dino = DINOLoss(PROTOTYPES).double()
    with pytest.raises(ValueError, match="1 student and 2 teacher views"):
        dino(student[:1], teacher, 0.04)
    with pytest.raises(ValueError, match=r"must be \[view, batch, 7\]"):
        dino(student[..., :6], teacher[..., :6], 0.04)
    with pytest.raises(ValueError, match="the batch is empty"):
        dino(student[:, :0], teacher[:, :0], 0.04)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    student, teacher = outputs(dtype=torch.float32)
    dino = DINOLoss(PROTOTYPES)
    expected = dino(student, teacher, 0.04)
    on_gpu = DINOLoss(PROTOTYPES).cuda()
    torch.testing.assert_close(on_gpu(student.cuda(), teacher.cuda(), 0.04).cpu(), expected)
    torch.testing.assert_close(on_gpu.center.cpu(), dino.center)


def test_center_follows_several_passes_as_it_follows_their_whole():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 11, 7), torch.randn(2, 11, 7)
    whole, parts = DINOLoss(7), DINOLoss(7)
    wanted = whole(student, teacher, 0.05)
    sizes = (4, 7)
    pieces = zip(student.split(sizes, 1), teacher.split(sizes, 1), strict=True)
    losses = [parts(*piece, 0.05, hold=True) for piece in pieces]
    assert not parts.center.any()
    parts.move_center()
    torch.testing.assert_close(parts.center, whole.center)
    got = sum(loss * share / 11 for loss, share in zip(losses, sizes, strict=True))
    torch.testing.assert_close(got, wanted)
    parts.move_center()  # nothing was seen since
    torch.testing.assert_close(parts.center, whole.center)
