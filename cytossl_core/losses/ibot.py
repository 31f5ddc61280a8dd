"""iBOT's loss: the student names the prototypes of tokens that only the teacher saw."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cytossl_core.losses.center import Centered


class IBOTLoss(Centered):
    """Cross-entropy between teacher and student at the masked tokens, with a center of its own.

    Args:
        prototypes: Outputs of the heads.
        student_temperature: Divides the student's outputs; above 0.
        center_momentum: Share of the old center that an update keeps.

    Attributes:
        center: Buffer [prototypes], the running mean of the teacher's outputs; part of the state.

    Source:
        Zhou et al. 2022, equation 3, https://arxiv.org/abs/2111.07832, weighted as in DINOv2's
        code: the mean over an image's masked tokens, then over all images, masked or not.
    """

    def __init__(
        self, prototypes: int, student_temperature: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__(prototypes, center_momentum)
        self.student_temperature = student_temperature

    def forward(
        self,
        student: Float[Tensor, "token prototype"],
        teacher: Float[Tensor, "token prototype"],
        image: Int64[Tensor, " token"],
        images: int,
        teacher_temperature: float,
        *,
        hold: bool = False,
    ) -> Float[Tensor, ""]:
        """The loss in nats; then, in training, the center moves by the teacher's outputs.

        Computed in float32 (or float64, if either input is) inside autocast too.

        Args:
            student: Raw outputs at the masked tokens of all images.
            teacher: The teacher's at the same tokens, from unmasked images; without gradient.
            image: Which image a token belongs to, 0 to below `images`.
            images: Number of images; those without masked tokens count as 0.
            teacher_temperature: Divides the centered outputs; above 0.
            hold: Leave the center where it is until `move_center`, see `DINOLoss`.

        Raises:
            ValueError: a temperature is not above 0, or there is no image.
        """
        if not (teacher_temperature > 0 and self.student_temperature > 0 and images > 0):
            raise ValueError(
                f"temperatures are {self.student_temperature} and {teacher_temperature}, images "
                f"{images}: they must be above 0"
            )
        with torch.autocast(student.device.type, enabled=False):
            wide = torch.promote_types(student.dtype, torch.float32)
            teacher = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
            target = ((teacher - self.center) / teacher_temperature).softmax(-1)
            logits = (student.to(wide) / self.student_temperature).log_softmax(-1)
            tokens = torch.bincount(image, minlength=images)  # masked ones of each image
            each = -(target * logits).sum(-1) / tokens[image]
            loss = each.sum() / images
        if self.training:
            self.note(teacher)
            if not hold:
                self.move_center()
        return loss
