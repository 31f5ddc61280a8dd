"""SimCLR, MoCo v3, BYOL and KoLeo as their papers print them, number by number."""

import math

import torch
from torch import Tensor


def unit(row: Tensor) -> Tensor:
    return row / (row * row).sum().sqrt()


def cosine(left: Tensor, right: Tensor) -> Tensor:
    return (unit(left) * unit(right)).sum()


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR, Algorithm 1: z_{2k-1} and z_{2k} are the views of patch k; l(i, j) is equation 1."""
    z = [view for pair in zip(first, second, strict=True) for view in pair]
    total = torch.zeros((), dtype=first.dtype)
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        below = sum((cosine(z[i], z[k]) / temperature).exp() for k in range(len(z)) if k != i)
        total = total - ((cosine(z[i], z[j]) / temperature).exp() / below).log()
    return total / len(z)


def mocov3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> Tensor:
    """MoCo v3, Algorithm 1: `loss = ctr(q1, k2) + ctr(q2, k1)`, `ctr` returning 2 tau CE."""

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        total = torch.zeros((), dtype=q.dtype)
        for i in range(len(q)):
            logits = torch.stack([cosine(q[i], key.detach()) / temperature for key in k])
            total = total - (logits[i] - logits.exp().sum().log())
        return 2 * temperature * total / len(q)

    return ctr(q1, k2) + ctr(q2, k1)


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL, equation 2: the squared distance of the unit vectors, mean over the batch."""
    terms = [
        (unit(p) - unit(z.detach())).square().sum() for p, z in zip(prediction, target, strict=True)
    ]
    return sum(terms) / len(terms)


def koleo(embedding: Tensor) -> Tensor:
    """Sablayrolles et al. 2019, equation 3: minus the mean log of the least distance to others."""
    rows = [unit(row) for row in embedding]
    total = 0.0
    for i, row in enumerate(rows):
        distances = [(row - other).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
        nearest = min(range(len(distances)), key=lambda at: distances[at].item())
        total = total - distances[nearest].log()
    return total / len(rows)


def uniform_nt_xent(batch: int) -> float:
    """The loss where all cosines are equal: ln of the candidates of an anchor."""
    return math.log(2 * batch - 1)
