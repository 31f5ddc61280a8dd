"""NT-Xent, MoCo v3's, BYOL's and KoLeo's losses against their printed definitions."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cytossl_core.losses import byol_loss, koleo_loss, mocov3_loss, nt_xent
from cytossl_core.losses.rows import check_pair
from tests.definitions import contrastive as definition

DIM = 7
LOSSES = {
    "nt_xent": (2, lambda a, b: nt_xent(a, b, 0.3), lambda a, b: definition.nt_xent(a, b, 0.3)),
    "mocov3": (
        4,
        lambda *rows: mocov3_loss(*rows, 0.2),
        lambda *rows: definition.mocov3(*rows, 0.2),
    ),
    "byol": (2, byol_loss, definition.byol),
    "koleo": (1, koleo_loss, definition.koleo),
}
LEARNS = {"nt_xent": 2, "mocov3": 2, "byol": 1, "koleo": 1}  # arguments that get a gradient


def rows(name: str, batch: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = (LOSSES[name][0], batch, DIM)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def value_and_gradients(loss, inputs):
    inputs = [one.clone().requires_grad_() for one in inputs]
    value = loss(*inputs)
    value.backward()
    return [value.detach(), *[one.grad for one in inputs if one.grad is not None]]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", [2, 3, 11])
def test_matches_definition_in_value_and_gradients(name, batch):
    _, loss, plain = LOSSES[name]
    got, expected = (value_and_gradients(one, rows(name, batch)) for one in (loss, plain))
    assert len(got) == len(expected) == 1 + LEARNS[name]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["nt_xent", "mocov3", "byol"])
def test_one_patch_has_no_negatives(name):
    inputs = rows(name, 1)
    expected = 0.0 if name != "byol" else definition.byol(*inputs).item()
    assert LOSSES[name][1](*inputs).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e15])
def test_lengths_of_the_rows_change_nothing(name, scale):
    inputs = rows(name, 5, torch.float32)
    scaled = [one * scale for one in inputs]
    _, loss, _ = LOSSES[name]
    value, *gradients = value_and_gradients(loss, scaled)
    torch.testing.assert_close(value, loss(*inputs), rtol=1e-5, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_equal_rows_cost_ln_of_the_candidates():
    same = torch.ones(6, DIM, dtype=torch.float64)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(definition.uniform_nt_xent(6))


def test_koleo_of_equal_rows_is_finite_with_a_finite_gradient():
    value, gradient = value_and_gradients(koleo_loss, [torch.ones(4, DIM)])
    assert value.item() == pytest.approx(-torch.tensor(1e-8).log().item(), rel=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_inside_autocast(name, dtype):
    inputs = rows(name, 6, dtype)
    _, loss, _ = LOSSES[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(*inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(*[one.float() for one in inputs]))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, (_, loss, _) in LOSSES.items():
        own = [one[rank::2] for one in rows(name, 6)]
        found[name] = value_and_gradients(loss, own)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_on_the_whole_batch(tmp_path):
    """DDP takes the mean of both ranks' gradients: so half of each row's gradient must be right."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (_, loss, _) in LOSSES.items():
        value, *gradients = value_and_gradients(loss, rows(name, 6))
        torch.testing.assert_close((ranks[0][name][0] + ranks[1][name][0]) / 2, value)
        for at, whole in enumerate(gradients, start=1):
            for rank in range(2):
                torch.testing.assert_close(ranks[rank][name][at] / 2, whole[rank::2])


@pytest.mark.parametrize("name", ["nt_xent", "mocov3", "byol"])
def test_rejects_empty_batches(name):
    with pytest.raises(ValueError, match="of one patch or more"):
        LOSSES[name][1](*[one[:0] for one in rows(name, 4)])


def test_rejects_shapes_that_differ():
    message = r"p and q have shapes \[4, 7\] and \[3, 7\]: both must be the same"
    with pytest.raises(ValueError, match=message):
        check_pair(torch.ones(4, 7), torch.ones(3, 7), "p and q")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_rejects_temperatures_that_are_not_positive(temperature):
    first, second = rows("nt_xent", 3)
    with pytest.raises(ValueError, match=f"temperature is {temperature}: it must be above 0"):
        nt_xent(first, second, temperature)
    with pytest.raises(ValueError, match=f"temperature is {temperature}: it must be above 0"):
        mocov3_loss(first, second, first, second, temperature)


def test_koleo_rejects_a_single_row():
    with pytest.raises(ValueError, match="has 1 rows on all ranks: KoLeo needs 2 or more"):
        koleo_loss(torch.ones(1, DIM))
