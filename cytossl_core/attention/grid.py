"""Which token grid an attention layer sees: told by the model at each call, or a square."""

import math

import torch
from torch import Tensor, nn


class ToldGrid:
    """The token grid of a model's latest call, shared by its layers.

    A square and a rectangle may have equally many tokens, so a layer cannot know by itself. Where
    gradients are checkpointed, backward runs layers again after calls with other images, and then
    the number of tokens tells which grid it was.
    """

    def __init__(self) -> None:
        self.latest: tuple[int, int] | None = None
        self.by_count: dict[int, tuple[int, int]] = {}  # of calls that a backward may follow
        self.ambiguous: set[int] = set()

    def tell(self, patch_embed: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of timm's patch embedding, which is given the images."""
        height, width = patch_embed.dynamic_feat_size(tuple(arguments[0].shape[-2:]))
        self.latest = (_fixed(height), _fixed(width))
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        count = self.latest[0] * self.latest[1]
        if self.by_count.setdefault(count, self.latest) != self.latest:
            self.ambiguous.add(count)

    def of(self, count: int) -> tuple[int, int] | None:
        """The grid, of `count` tokens unless the layer was given others than the model's."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.latest  # not in a backward
        if count in self.ambiguous:
            raise ValueError(
                f"images made token grids of several shapes with {count} tokens, and checkpointed "
                "gradients cannot tell which one this was: train with one of them"
            )
        return self.by_count.get(count, self.latest)


def token_grid(
    token: int, special_tokens: int, grid: tuple[int, int] | None, told: ToldGrid | None = None
) -> tuple[int, int]:
    """Height and width of the grid that `token` tokens hold, after the special ones."""
    token = _fixed(token)
    count = token - special_tokens
    found = f"attention has {count} tokens after {special_tokens} special tokens"
    if count < 1:
        raise ValueError(
            f"attention has {token} tokens, and {special_tokens} of them would be special: "
            "give it more tokens, or less special_tokens"
        )
    called = told.of(count) if told is not None else None
    if called is not None and grid not in (None, called):
        raise ValueError(
            f"SRAttention.grid is {grid[0]} x {grid[1]}, but the images make {called[0]} x "
            f"{called[1]}: leave .grid None, the model tells it"
        )
    grid = called or grid
    side = math.isqrt(count)
    if grid is None and side**2 != count:
        raise ValueError(f"{found}, not a square grid: set SRAttention.grid to (height, width)")
    if grid is None:
        return side, side
    if grid[0] * grid[1] != count:
        where = "the images' grid" if called else ".grid"
        cure = "no token may be left out" if called else "set .grid anew, or None"
        raise ValueError(f"{found}, not the {grid[0]} x {grid[1]} of {where}: {cure}")
    return grid


def _fixed(size: int) -> int:
    """The same number, no symbol of a compiler's: it makes one graph per grid."""
    return len(range(size))
