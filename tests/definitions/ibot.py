"""iBOT, equation 3 of Zhou et al. 2022, token by token, with DINOv2's weights."""

import torch
from torch import Tensor

from tests.definitions.dino import log_softmax, softmax


def loss(
    student: list[list[Tensor]], teacher: list[list[Tensor]], center: Tensor, tps: float, tpt: float
) -> Tensor:
    """Of each image the masked tokens' outputs: the mean within an image, then over images."""
    total = torch.zeros((), dtype=center.dtype)
    for students, teachers in zip(student, teacher, strict=True):
        of_image = torch.zeros((), dtype=center.dtype)
        for s, t in zip(students, teachers, strict=True):
            of_image = (
                of_image - (softmax((t.detach() - center) / tpt) * log_softmax(s / tps)).sum()
            )
        if len(students):
            total = total + of_image / len(students)
    return total / len(student)
