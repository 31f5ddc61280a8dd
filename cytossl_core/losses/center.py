"""The running mean of a teacher's outputs, which keeps one prototype from taking all."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class Centered(nn.Module):
    """A loss that takes a running mean off the teacher's outputs.

    Attributes:
        center: Buffer [prototypes]; part of the state.

    Source:
        Caron et al. 2021, equation 4, https://arxiv.org/abs/2104.14294. Differs in one thing: the
        mean is over all rows of all ranks, also where ranks hold different numbers of them.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        if prototypes < 1:
            raise ValueError(f"prototypes is {prototypes}: it must be 1 or more (65536 in DINO)")
        if not 0 <= momentum < 1:
            raise ValueError(
                f"center_momentum is {momentum}: it must be from 0 to below 1 (0.9 in DINO)"
            )
        self.center_momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self._held: Tensor | None = None  # sums of outputs that the center has still to follow

    @torch.no_grad()
    def note(self, outputs: Float[Tensor, "row prototype"]) -> None:
        """Remember a teacher's raw outputs for `move_center`."""
        total = torch.cat([outputs.sum(0), outputs.new_tensor([len(outputs)])])  # one message
        self._held = total if self._held is None else self._held + total

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the center towards the mean of what all ranks noted since it last moved.

        Without any row on any rank it rests.
        """
        if self._held is None:
            return
        total, self._held = self._held, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        mean = (total[:-1] / total[-1]).to(self.center.dtype)
        moved = torch.lerp(self.center, mean, 1 - self.center_momentum)
        self.center.copy_(torch.where(total[-1] > 0, moved, self.center))
