"""Ranks: the processes of one run, a device each, that torchrun starts.

`torchrun --nproc-per-node 8 -m stages.pretrain` runs this program eight times at once; without
torchrun there is one rank, and nothing here does anything. The ranks meet through torchrun's
environment variables (env://), over NCCL between GPUs and over gloo between CPUs.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run."""

    rank: int  # number of this one
    count: int
    device: torch.device  # of this one

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, rows: list[int], passes: int) -> list[list[int]]:
        """This rank's part of a batch, for each of `passes` passes.

        A pass holds the same patches whatever the number of ranks.
        """
        ends = [at * len(rows) // passes for at in range(passes + 1)]
        parts = [rows[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
        return [part[self.rank :: self.count] for part in parts]

    def with_norms(self, encoder: nn.Module) -> nn.Module:
        """`encoder` with batch norms that see the rows of all ranks.

        Raises:
            ValueError: it has some, and the ranks are CPUs: torch has none for these.
        """
        if self.count == 1 or not any(isinstance(one, _BatchNorm) for one in encoder.modules()):
            return encoder
        if self.device.type == "cpu":
            raise ValueError(
                f"the backbone has batch norms, and {self.count} processes on CPUs cannot share "
                "them: use one process, GPUs, or a vision transformer"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(encoder)

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with gradients that are averaged over all ranks in backward."""
        if self.count == 1:
            return module
        parallel = DistributedDataParallel(module)
        if self.device.type == "cpu":
            parallel.register_comm_hook(None, _mean_in_order)
        return parallel

    def averaging(self, module: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Whether the backward inside averages the gradients of all passes up to it."""
        return nullcontext() if now or self.count == 1 else module.no_sync()

    def mean(self, values: Float[Tensor, " value"]) -> Float[Tensor, " value"]:
        """The mean over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def agreed(self, value: T) -> T:
        """What the first rank has for `value`, on every rank."""
        if self.count == 1:
            return value
        message = [value]
        dist.broadcast_object_list(message)
        return message[0]

    def wait(self) -> None:
        """Go on when the first rank has come here."""
        self.agreed(None)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run; those after the first log errors only.

    Raises:
        ValueError: there are more ranks on this machine than GPUs.
    """
    rank, count, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = _device(local)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    if rank:
        logging.getLogger().setLevel(logging.ERROR)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Ranks(rank, count, device)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are no more


def _device(local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local >= found:
        raise ValueError(
            f"process {local} of this machine has no GPU, there are {found}: start torchrun with "
            f"--nproc-per-node {found}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _mean_in_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of the ranks' gradients, added in the order of ranks.

    DDP packs gradients anew after its first step, and gloo's own sums depend on where in a pack a
    number lies: a resumed run would differ from an unbroken one in the last bit.
    """
    own = bucket.buffer()
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    gathered = dist.all_gather(every, own, async_op=True).get_future()
    return gathered.then(lambda _: functools.reduce(torch.add, every) / len(every))
