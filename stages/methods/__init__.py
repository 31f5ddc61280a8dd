"""What `stages.pretrain` asks of a method: `build(encoder, params, image_px)` returns one."""

from typing import Any, Protocol

from jaxtyping import Float, Int64
from torch import Tensor, nn

from stages.common.views import ViewPolicy


class Method(Protocol):
    """A module whose forward is the loss; parameters that require a gradient are trained.

    All that a resumed run needs lies in parameters and buffers. `progress` is the share of all
    steps taken before this one, 0 to below 1; schedules are functions of it.
    """

    view_policies: list[ViewPolicy]  # how views are made
    encoder: nn.Module  # what is saved

    def __call__(
        self,
        views: list[Float[Tensor, "batch 3 px px"]],
        progress: float,
        keys: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The loss, the mean over this rank's patches.

        `views` are those of `make_views`: in the order of `view_policies`. What a method draws by
        itself, it draws from `keys` (on the CPU, see `chance.keys_of`) and nothing else.
        """
        ...

    def after_backward(self, progress: float) -> None:
        """Change gradients, after they were clipped."""
        ...

    def after_step(self, progress: float) -> None:
        """Move what no gradient moves: averages, queues."""
        ...

    def monitor(self, progress: float) -> dict[str, float]:
        """Numbers that show the health of training, of the last step; every rank asks at once."""
        ...


def fitted(of_method: Any, patches: int) -> Any:
    """A method's params, what they leave to the number of patches being chosen."""
    return of_method.fitted(patches) if hasattr(of_method, "fitted") else of_method


def sizes(of_method: Any) -> dict[str, int]:
    """Of a method's params what may have been chosen by the data, for the metrics."""
    return {"prototypes": of_method.prototypes} if hasattr(of_method, "prototypes") else {}
