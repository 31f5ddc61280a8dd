"""Numbers that show whether a method still tells patches apart; alike for all methods."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.rows import of_all_ranks

ENOUGH = 16  # patches that show whether they are told apart


class Seen:
    """What a step's newest passes showed, of `ENOUGH` patches or more where it has so many.

    One pass may hold one patch, which says nothing of how patches differ.
    """

    def __init__(self) -> None:
        self._progress = -1.0
        self._passes: list[tuple[int, tuple[Tensor, ...]]] = []

    def note(self, progress: float, patches: int, *rows: Tensor) -> None:
        """One more pass; those of a step have one `progress`. Older ones that are spare go."""
        if progress != self._progress:
            self._passes.clear()
        self._progress = progress
        self._passes.append((patches, tuple(some.detach() for some in rows)))
        while self.patches - self._passes[0][0] >= ENOUGH:
            del self._passes[0]

    @property
    def patches(self) -> int:
        """How many are held on this rank."""
        return sum(patches for patches, _ in self._passes)

    def rows(self) -> list[Tensor]:
        """Each kind of rows, float32, over the passes; and over the ranks where one has too few.

        Every rank must ask.
        """
        kinds = zip(*(rows for _, rows in self._passes), strict=True)
        own = [torch.cat(kind).float() for kind in kinds]
        return own if self.patches >= ENOUGH else [of_all_ranks(some)[0] for some in own]


def embedding_std(embedding: Float[Tensor, "row dim"]) -> float:
    """Of unit rows over the batch, times the root of their length.

    Near 1 they point everywhere, at 0 all one way.
    """
    spread = F.normalize(embedding.float(), dim=1).std(0, unbiased=len(embedding) > 1)
    return spread.square().mean().sqrt().item() * math.sqrt(embedding.shape[1])


def cosines(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> dict:
    """Mean cosine of two views of a patch, and of views of two patches; equal ones are a collapse.

    `negative_cosine` is left out where the batch holds one patch.
    """
    product = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    same = product.diagonal().mean().item()
    if len(product) == 1:
        return {"positive_cosine": same}
    others = ~torch.eye(len(product), dtype=torch.bool, device=product.device)
    return {"positive_cosine": same, "negative_cosine": product[others].mean().item()}
