"""Numbers that show whether a method still tells patches apart; alike for all methods."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
