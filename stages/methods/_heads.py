"""Projectors and predictors: perceptrons whose batch norms see the rows of every rank."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows of all ranks, on any device; every rank holds equally many.

    torch's SyncBatchNorm is for GPUs only.
    """

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Normalise by the batch in training, else by the running statistics."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or ranks == 1:
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            wide = torch.promote_types(rows.dtype, torch.float32)
            return self._over_ranks(rows.to(wide), ranks * len(rows))

    def _over_ranks(
        self, rows: Float[Tensor, "batch dim"], count: int
    ) -> Float[Tensor, "batch dim"]:
        mean = all_reduce(rows.sum(0)) / count
        variance = all_reduce((rows - mean).square().sum(0)) / count
        self._remember(mean.detach(), variance.detach() * count / max(count - 1, 1))
        normal = (rows - mean) * (variance + self.eps).rsqrt()
        return normal if self.weight is None else normal * self.weight + self.bias

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def perceptron(widths: list[int], bias: bool, norm_last: bool) -> nn.Sequential:
    """Linear layers of these widths, each but the last followed by a batch norm and a ReLU.

    Args:
        widths: Of input, hidden layers, output.
        bias: Whether the linear layers have one.
        norm_last: Whether a batch norm without scale and shift ends it (MoCo v3's projector).
    """
    layers: list[nn.Module] = []
    for dim, following in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(dim, following, bias=bias), BatchNorm(following), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    if norm_last:
        layers.append(BatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)
