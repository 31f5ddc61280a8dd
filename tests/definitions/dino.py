"""DINO, Algorithm 1 of Caron et al. 2021, with its multi-crop sum, number by number.

The printed H(t, s) reads `t = t.detach(); s = softmax(s / tps); t = softmax((t - C) / tpt);
return - (t * log(s)).sum(dim=1).mean()`, and the center `C = m*C + (1-m)*cat([t1, t2]).mean(dim=0)`
after the student's step. Equation 3 sums over every teacher view and every other student view.
"""

import torch
from torch import Tensor


def softmax(row: Tensor) -> Tensor:
    powers = (row - row.max()).exp()
    return powers / powers.sum()


def log_softmax(row: Tensor) -> Tensor:
    shifted = row - row.max()
    return shifted - shifted.exp().sum().log()


def cross_entropy(t: Tensor, s: Tensor, center: Tensor, tps: float, tpt: float) -> Tensor:
    """H(t, s) of two batches [batch, prototype]."""
    total = torch.zeros((), dtype=s.dtype)
    for patch in range(len(t)):
        p_t = softmax((t[patch].detach() - center) / tpt)
        log_p_s = log_softmax(s[patch] / tps)
        for prototype in range(len(center)):
            total = total - p_t[prototype] * log_p_s[prototype]
    return total / len(t)


def loss(student: Tensor, teacher: Tensor, center: Tensor, tps: float, tpt: float) -> Tensor:
    """The mean of H over the pairs of different views."""
    terms = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                terms.append(cross_entropy(teacher[t], student[s], center, tps, tpt))
    return sum(terms) / len(terms)


def moved_center(center: Tensor, teacher: Tensor, m: float) -> Tensor:
    rows = [row for view in teacher for row in view]
    return m * center + (1 - m) * sum(rows) / len(rows)
