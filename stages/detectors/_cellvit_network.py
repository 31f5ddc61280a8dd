"""CellViT's network as far as nuclei need it: shared skips, the branches of mask and maps.

Written anew from the paper (Hörst et al. 2024, arXiv 2306.15350; a UNETR) and the public code's
names and shapes, so that it loads the released weights as they are. The branch that tells types of
nuclei apart and the head that names the tissue are left out: nothing here reads them.
"""

import torch
from torch import nn

from stages.detectors._cellvit_encoders import Image, Plain, Sizes, Windowed

BRANCHES = ("nuclei_binary_map_decoder", "hv_map_decoder")


class CellViT(nn.Module):
    """Image in, per pixel the logits of (background, nucleus) and the two offset maps out.

    Args:
        sizes: Of one of `RELEASED`, or smaller ones.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        coarse, middle, fine, finest = sizes.widths
        first, second = sizes.skips
        self.encoder = Windowed(sizes) if sizes.window else Plain(sizes)
        self.decoder0 = nn.Sequential(_Conv(3, finest // 2), _Conv(finest // 2, finest))
        self.decoder1 = nn.Sequential(
            _Double(sizes.dim, first), _Double(first, second), _Double(second, fine)
        )
        self.decoder2 = nn.Sequential(_Double(sizes.dim, first), _Double(first, middle))
        self.decoder3 = nn.Sequential(_Double(sizes.dim, coarse))
        for name in BRANCHES:
            self.add_module(name, _Branch(sizes.dim, sizes.widths))

    def forward(self, image: Image) -> tuple[Image, Image]:
        """Run the network.

        Args:
            image: Square, its side a multiple of `_cellvit_encoders.TOKEN_PX`.

        Returns:
            Logits of (background, nucleus), and (horizontal, vertical) offsets from the nucleus'
            centre, -1 to 1; both [batch, 2, height, width].
        """
        one, two, three, four = self.encoder(image)
        skips = self.decoder0(image), self.decoder1(one), self.decoder2(two), self.decoder3(three)
        mask, maps = (getattr(self, name)(four, skips) for name in BRANCHES)
        return mask, maps


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, image: Image) -> Image:
        return self.block(image)


class _Double(_Conv):
    """Twice the side, then a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, outputs)
        self.block.insert(0, nn.ConvTranspose2d(inputs, outputs, 2, stride=2))


class _Branch(nn.Module):
    def __init__(self, dim: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        coarse, middle, fine, finest = widths
        self.bottleneck_upsampler = nn.ConvTranspose2d(dim, coarse, 2, stride=2)
        self.decoder3_upsampler = _step(coarse, middle, convolutions=3)
        self.decoder2_upsampler = _step(middle, fine, convolutions=2)
        self.decoder1_upsampler = _step(fine, finest, convolutions=2)
        self.decoder0_header = nn.Sequential(
            _Conv(2 * finest, finest), _Conv(finest, finest), nn.Conv2d(finest, 2, 1)
        )

    def forward(self, tokens: Image, skips: tuple[Image, ...]) -> Image:
        up = self.bottleneck_upsampler(tokens)
        steps = self.decoder0_header, self.decoder1_upsampler, self.decoder2_upsampler
        for skip, step in zip(skips[::-1], (self.decoder3_upsampler, *steps[::-1]), strict=True):
            up = step(torch.cat([skip, up], dim=1))
        return up


def _step(width: int, next_width: int, convolutions: int) -> nn.Sequential:
    inputs = [2 * width] + [width] * (convolutions - 1)
    up = nn.ConvTranspose2d(width, next_width, 2, stride=2)
    return nn.Sequential(*[_Conv(count, width) for count in inputs], up)
