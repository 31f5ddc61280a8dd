"""What methods share over ranks: batch norms, and what is seen of their health."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stages.methods import _health
from stages.methods._heads import BatchNorm, perceptron


def head() -> nn.Module:
    torch.manual_seed(2)
    return perceptron([6, 5, 3], bias=True, norm_last=True).double()


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    rows = torch.randn(8, 6, dtype=torch.float64)[rank::2].requires_grad_()
    network = head()
    with torch.autocast("cpu", torch.bfloat16):
        BatchNorm(6)(torch.ones(4, 6, dtype=torch.bfloat16))  # heads of 16 bits work too
    out = network(rows)
    (out**3).sum().backward()
    grads = [value.grad for value in network.parameters()]
    told = [out.detach(), rows.grad, grads, network.state_dict()]
    torch.save([told, _seen(rank)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _seen(rank: int) -> list[torch.Tensor]:
    few, many = _health.Seen(), _health.Seen()
    few.note(0.5, 1, torch.full((1, 2), float(rank)).bfloat16())
    many.note(0.5, _health.ENOUGH, torch.full((_health.ENOUGH, 2), float(rank)))
    return [*few.rows(), *many.rows()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_where_a_rank_has_few_patches_those_of_the_others_are_seen_too(ranks):
    for rank, (_, (few, many)) in enumerate(ranks):
        assert few.tolist() == [[0, 0], [1, 1]]
        assert many.unique().tolist() == [rank]


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch(ranks):
    torch.manual_seed(0)
    rows = torch.randn(8, 6, dtype=torch.float64).requires_grad_()
    network = head()
    assert sum(isinstance(layer, BatchNorm) for layer in network) == 2
    out = network(rows)
    (out**3).sum().backward()
    for rank, ((found, gradient, grads, state), _) in enumerate(ranks):
        torch.testing.assert_close(found, out[rank::2])
        torch.testing.assert_close(gradient, rows.grad[rank::2])
        for name, value in network.state_dict().items():
            torch.testing.assert_close(state[name], value)
        both = [one + other for one, other in zip(grads, ranks[1 - rank][0][2], strict=True)]
        for one, value in zip(both, network.parameters(), strict=True):
            torch.testing.assert_close(one, value.grad, atol=1e-12, rtol=1e-7)
