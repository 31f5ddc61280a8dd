"""What params mean for a run: the optimizer, the rates, what is refused."""

import dataclasses
import math

import pytest
import torch

from stages.common import optimizer, preflight, training
from tests.stages.runs import DINO, changed


def test_gradients_are_clipped_tensor_by_tensor():
    torch.manual_seed(0)
    tensors = [torch.nn.Parameter(torch.empty(3, 5)), torch.nn.Parameter(torch.empty(7))]
    tensors.append(torch.nn.Parameter(torch.empty(2)))  # without a gradient
    for tensor, norm in zip(tensors, (10.0, 0.5), strict=False):
        tensor.grad = torch.randn_like(tensor)
        tensor.grad *= norm / tensor.grad.norm()
    before = [tensor.grad.clone() for tensor in tensors[:2]]
    assert optimizer.clip_each(tensors, 3.0).item() == pytest.approx(math.hypot(10, 0.5))
    torch.testing.assert_close(tensors[0].grad, before[0] * 0.3)
    torch.testing.assert_close(tensors[1].grad, before[1])
    optimizer.clip_each(tensors, 0.0)
    torch.testing.assert_close(tensors[0].grad, before[0] * 0.3)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizer_decays_matrices_only(name):
    matrix, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,)))
    built = optimizer.build([matrix, bias], name)
    optimizer.schedule(built, 0.1, 0.5)
    matrix.grad, bias.grad = torch.zeros(2, 3), torch.zeros(3)
    built.step()
    # adamw: 1 - 0.1 * 0.5; adam: the decay is the gradient, and its first step has length 0.1.
    torch.testing.assert_close(matrix, torch.full((2, 3), {"adam": 0.9, "adamw": 0.95}[name]))
    torch.testing.assert_close(bias, torch.ones(3))


def test_learning_rate_is_in_proportion_to_the_batch():
    settings = changed(learning_rate=5e-4, batch=64, epochs=10, warmup_epochs=2.0)
    rates = [training.rates(settings, at)["learning_rate"] for at in (0.0, 0.1, 0.2, 0.6)]
    peak = 5e-4 * 64 / 256
    assert rates == pytest.approx([0, peak / 2, peak, (peak + 1e-6) / 2])


@pytest.mark.parametrize("warmup", [0.5, 1.0, 7.0])
def test_a_warm_up_takes_half_of_a_short_run_at_most(warmup):
    settings = changed(learning_rate=1e-3, batch=256, epochs=1, warmup_epochs=warmup)
    rates = [training.rates(settings, at)["learning_rate"] for at in (0.0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, (1e-3 + 1e-6) / 2])


def test_names_the_weight_that_is_not_finite():
    network = torch.nn.BatchNorm1d(3)
    training.check_weights(network, 9)
    for name in ("weight", "running_var"):
        broken = torch.nn.BatchNorm1d(3)
        broken.state_dict()[name][1] = math.inf
        with pytest.raises(ValueError, match=f"{name} is not finite after the last step, 9"):
            training.check_weights(broken, 9)


def test_a_divergence_names_checkpoints_only_where_there_are_some(tmp_path):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for files, told in ((0, ""), (1, f"; the checkpoints of this one stay in {tmp_path}")):
        for at in range(files):
            (tmp_path / f"step-{at:09d}.pt").touch()
        with pytest.raises(ValueError, match="which begins a new run") as refused:
            training.check_finite(math.nan, 1.0, scaler, 7, tmp_path)
        assert str(refused.value).endswith(f"which begins a new run{told}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_px": 8}, r"pretrain\.global_px is 8: it must be 13 or more"),
        ({"global_px": 25}, r"pretrain\.global_px is 25: it must be a multiple of token_px, 8"),
        ({"epochs": 0}, r"pretrain\.epochs is 0: it must be 1 or more"),
        ({"warmup_epochs": -1.0}, r"warmup_epochs is -1\.0: it must be 0 or more"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0: it must be above 0"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0: it must be from 0 to below 1"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0: it must be 0 or more"),
    ],
)
def test_rejects_settings_with_which_nothing_trains(values, message):
    with pytest.raises(ValueError, match=message):
        changed(**values)


def test_rejects_recomputing_batch_statistics():
    settings = changed(gradient_checkpointing=True)
    preflight.check_encoder(settings, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="gradient_checkpointing is true: .* has batch norms"):
        preflight.check_encoder(settings, torch.nn.Sequential(torch.nn.BatchNorm2d(3)))


def test_rejects_neighbours_where_a_pass_has_one_patch():
    spread = dataclasses.replace(DINO, koleo_weight=0.1)
    preflight.check_spread(changed(batch=6, accumulate=3), spread)
    preflight.check_spread(changed(batch=6, accumulate=6), DINO)
    message = r"pretrain\.dino\.koleo_weight is 0\.1: .*batch 6 over pretrain\.accumulate 6"
    with pytest.raises(ValueError, match=message):
        preflight.check_spread(changed(batch=6, accumulate=6), spread)
