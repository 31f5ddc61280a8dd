"""The small convolutional encoder that LESS trains with positive-unlabelled learning."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CHANNELS, LAST, HIDDEN = 64, 10, 1000
LEAST_PX = 16


class PatchCNN(nn.Module):
    """Four convolutions and two linear layers; it sees images of one side only.

    1.1 million parameters for 128 px and 384 numbers, 3.4 million for 256 px and 768.

    Args:
        dim: Numbers of an embedding (LESS: 384 for patches of 128 px, 768 for 256 px).
        image_px: Side of the images.

    Raises:
        ValueError: images are smaller than 16 px.

    Source:
        Zhao et al. 2023, LESS, https://arxiv.org/abs/2306.03407; kernels, strides, widths and
        numbers of parameters as its authors' code has them. No batch norm is here, so that a
        patch's embedding does not depend on its batch.
    """

    def __init__(self, dim: int, image_px: int) -> None:
        super().__init__()
        if image_px < LEAST_PX:
            raise ValueError(f"image_px is {image_px}: it must be {LEAST_PX} or more")
        self.num_features, self.image_px = dim, image_px
        side = math.ceil(image_px / 16)  # each stride rounds up
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 7, stride=4, padding=3),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, LAST, 1),
            nn.ReLU(),
        )
        self.hidden = nn.Linear(LAST * side**2, HIDDEN)
        self.embedding = nn.Linear(HIDDEN, dim)

    def forward(self, images: Float[Tensor, "batch 3 px px"]) -> Float[Tensor, "batch dim"]:
        """Embeddings, before any activation."""
        return self.embedding(F.relu(self.hidden(self.convolutions(images).flatten(1))))
