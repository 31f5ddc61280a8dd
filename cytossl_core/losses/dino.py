"""DINO's loss: the student's views predict the teacher's sharpened and centered outputs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cytossl_core.losses.center import Centered


class DINOLoss(Centered):
    """Cross-entropy between teacher and student prototypes, with the teacher's running center.

    Args:
        prototypes: Outputs of the projection heads, K in the paper.
        student_temperature: Divides the student's outputs; no unit, above 0.
        center_momentum: Share of the old center that an update keeps, 0 to below 1.

    Attributes:
        center: Buffer [prototypes], the running mean of the teacher's outputs; part of the state.

    Raises:
        ValueError: An argument is outside its range.

    Source:
        Caron et al. 2021, Algorithm 1 and equations 1 to 4, https://arxiv.org/abs/2104.14294, with
        temperatures and center of its code, facebookresearch/dino main_dino.py. Cyto-SSL's
        equation 1 is one term of the sum. Differs in one thing: the center is the mean over all
        rows of all ranks, also where ranks hold batches of different sizes.
    """

    def __init__(
        self, prototypes: int, student_temperature: float = 0.1, center_momentum: float = 0.9
    ):
        super().__init__(prototypes, center_momentum)
        _require_positive("student_temperature", student_temperature, "0.1")
        self.student_temperature = student_temperature

    def forward(
        self,
        student: Float[Tensor, "view batch prototype"],
        teacher: Float[Tensor, "2 batch prototype"],
        teacher_temperature: float,
        *,
        hold: bool = False,
    ) -> Float[Tensor, ""]:
        """The mean over pairs of different views and over the batch; then the center moves.

        Computed in float32 (or float64, if either input is) inside autocast too. The center moves
        in training mode only, after the loss, by the teacher's raw outputs of all ranks.

        Args:
            student: Raw outputs for all views; the first two are the ones the teacher saw.
            teacher: Raw outputs for the first two views; no gradient flows into them.
            teacher_temperature: Divides the centered outputs; above 0 (0.04 to 0.07 in DINO).
            hold: Leave the center where it is until `move_center`, which then follows the outputs
                of all calls since it last moved: a step of several passes equals one of one.

        Returns:
            The loss in nats; ln(prototypes) where all outputs are uniform.

        Raises:
            ValueError: Fewer than two views, shapes that do not agree, or a temperature of 0 or
                below.
        """
        self._check(student, teacher, teacher_temperature)
        with torch.autocast(student.device.type, enabled=False):
            teacher = _at_least_float32(teacher.detach())
            targets = ((teacher - self.center) / teacher_temperature).softmax(-1)
            logits = _at_least_float32(student) / self.student_temperature
            loss = _cross_entropy(logits, targets)
            if self.training:
                self.note(teacher.flatten(0, 1))
        if self.training and not hold:
            self.move_center()
        return loss

    def _check(self, student: Tensor, teacher: Tensor, teacher_temperature: float) -> None:
        _require_positive("teacher_temperature", teacher_temperature, "0.04 to 0.07")
        if len(student) < 2 or len(teacher) != 2:
            raise ValueError(
                f"{len(student)} student and {len(teacher)} teacher views: there must be at least "
                "2 student views, the first two of them being the teacher's 2"
            )
        if student.shape[1:] != teacher.shape[1:] or student.shape[2:] != self.center.shape:
            raise ValueError(
                f"student is {list(student.shape)}, teacher {list(teacher.shape)}: both must be "
                f"[view, batch, {len(self.center)}], as many prototypes as DINOLoss was made with"
            )
        if not student.shape[1]:
            raise ValueError("the batch is empty: DINO's loss is a mean over one or more patches")


def _cross_entropy(
    logits: Float[Tensor, "view batch prototype"], targets: Float[Tensor, "2 batch prototype"]
) -> Float[Tensor, ""]:
    """Mean over the pairs (teacher view, student view) of different views, and over the batch."""
    first, second = targets
    # The cross-entropy is linear in its target, so one pass per student view serves both teachers.
    wanted = [second, first] + [first + second] * (len(logits) - 2)
    pairs = 2 * len(logits) - 2
    terms = [
        F.cross_entropy(view, target, reduction="sum")
        for view, target in zip(logits, wanted, strict=True)
    ]
    return torch.stack(terms).sum() / (pairs * logits.shape[1])


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _require_positive(name: str, temperature: float, published: str) -> None:
    if not temperature > 0:
        raise ValueError(f"{name} is {temperature}: it must be above 0 ({published} in DINO)")
