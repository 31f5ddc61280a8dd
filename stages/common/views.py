"""Views of patches for self-supervised training, made in batches on the device.

Step 3 of the paper: a square around a retained nucleus is cut, turned, mirrored and scaled in one
resampling, then its colours are changed as DINO changes them. Every random number is a hash of the
patch's key and the number of the view, drawn on the CPU: a view does not depend on what else is in
the batch, nor on how many workers there are. On the CPU it has the same bits in any batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    solarize,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

from stages.common import chance

# The strengths of DINO's colour changes (main_dino.py, DataAugmentationDINO).
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
SIGMA_PX = (0.1, 2.0)
BLUR_PX = 13  # three sigma to each side
SOLARIZE_ABOVE = 0.5
_DRAWS = (
    *("point", "x", "y", "scale", "angle", "mirror_x", "mirror_y"),
    *("jitter", "brightness", "contrast", "saturation", "hue"),
    *("gray", "blur", "sigma", "solarize"),
)


@dataclass(frozen=True)
class ViewPolicy:
    """How one kind of view is made (global or local, teacher's or student's)."""

    views: int  # of this kind, per patch
    crop_px: int  # side of a view
    scale: tuple[float, float]  # area of the crop as a share of the patch's: smallest, largest
    rotation_degrees: float  # turned by up to so much either way; 180: any orientation
    flip: float  # probability of mirroring, for each axis
    jitter: float  # probability of changed brightness, contrast, saturation and hue
    gray: float  # probability of losing the colours
    blur: float  # probability of a Gaussian blur
    solarize: float  # probability that bright pixels are inverted

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if self.views < 0 or self.crop_px < BLUR_PX:
            raise ValueError(
                f"views is {self.views}, crop_px {self.crop_px}: they must be at least 0, {BLUR_PX}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale is {self.scale}: it must be two shares of the area, above 0, up to 1, "
                "the smaller first"
            )
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from 0 to 1")


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one view of each patch: [batch] each, float64 unless it says bool."""

    x: np.ndarray  # middle of the crop, patch pixels
    y: np.ndarray
    side_px: np.ndarray  # of the crop, patch pixels
    angle: np.ndarray  # radians; the view's right is turned towards the patch's bottom
    mirror_x: np.ndarray  # 1 or -1
    mirror_y: np.ndarray
    jitter: np.ndarray  # whether it applies, bool; so gray, blur and solarize
    brightness: np.ndarray  # factor; so contrast and saturation
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # shift, radians
    gray: np.ndarray
    blur: np.ndarray
    sigma_px: np.ndarray
    solarize: np.ndarray


def make_views(
    patches: UInt8[Tensor, "batch 3 height width"],
    points: Float[Tensor, "batch point 2"],
    keys: Int64[Tensor, " batch"],
    policies: list[ViewPolicy],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> list[Float[Tensor, "batch 3 crop crop"]]:
    """All views of a batch of patches, in the order of the policies.

    Args:
        patches: RGB patches on the device where the views are wanted.
        points: Retained nuclei on the CPU, (x, y) in patch pixels; NaN rows are padding. A crop is
            centered on one of them, or lies anywhere in a patch that has none.
        keys: One number per patch, on the CPU, see `chance.keys_of`.
        policies: The kinds of views; their `views` add up.
        mean: Of red, green and blue in 0 to 1; taken off each view.
        std: Divides what is left.

    Returns:
        One tensor per view, float32 [batch, 3, crop_px, crop_px], normalised.

    Source:
        Cyto-SSL, Algorithm 1 lines 4 to 13 and Step 3; colours as DINO, Caron et al. 2021, whose
        probabilities are the policy's. Differs from DINO: crops are square, and brightness,
        contrast, saturation and hue change in this order, not in a random one.
    """
    images = patches.float() / 255
    offset, spread = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    kinds = [policy for policy in policies for _ in range(policy.views)]
    views = []
    with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
        for number, policy in enumerate(kinds):
            drawn = draw(points, keys, number, policy, (patches.shape[2], patches.shape[3]))
            views.append((recolour(cut(images, drawn, policy), drawn) - offset) / spread)
    return views


def draw(
    points: Float[Tensor, "batch point 2"],
    keys: Int64[Tensor, " batch"],
    number: int,
    policy: ViewPolicy,
    extent: tuple[int, int],
) -> Drawn:
    """What view `number` of each patch shall be like; `extent` is a patch's height and width."""
    uniform = dict(zip(_DRAWS, chance.uniform(keys, number, len(_DRAWS)), strict=True))
    signed = {name: 2 * value - 1 for name, value in uniform.items()}  # -1 to 1
    small, large = policy.scale
    side_px = np.sqrt((small + (large - small) * uniform["scale"]) * math.prod(extent))
    x, y = _middle(points.double().numpy(), uniform, side_px, extent)
    return Drawn(
        x=x,
        y=y,
        side_px=side_px,
        angle=math.radians(policy.rotation_degrees) * signed["angle"],
        mirror_x=np.where(uniform["mirror_x"] < policy.flip, -1.0, 1.0),
        mirror_y=np.where(uniform["mirror_y"] < policy.flip, -1.0, 1.0),
        jitter=uniform["jitter"] < policy.jitter,
        brightness=1 + BRIGHTNESS * signed["brightness"],
        contrast=1 + CONTRAST * signed["contrast"],
        saturation=1 + SATURATION * signed["saturation"],
        hue=2 * math.pi * HUE * signed["hue"],
        gray=uniform["gray"] < policy.gray,
        blur=uniform["blur"] < policy.blur,
        sigma_px=SIGMA_PX[0] + (SIGMA_PX[1] - SIGMA_PX[0]) * uniform["sigma"],
        solarize=uniform["solarize"] < policy.solarize,
    )


def _middle(
    points: Float[np.ndarray, "batch point 2"],
    uniform: dict[str, np.ndarray],
    side_px: Float[np.ndarray, " batch"],
    extent: tuple[int, int],
) -> list[np.ndarray]:
    """The x and y of the crops: a point, moved until the unturned crop lies in the patch."""
    points = np.pad(points, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
    real = ~np.isnan(points).any(2)
    chosen = np.argsort(~real, axis=1, kind="stable")  # padding last
    row = np.arange(len(points))
    point = points[row, chosen[row, (uniform["point"] * real.sum(1)).astype(int)]]
    middle = []
    for axis, length in enumerate(extent[::-1]):
        low, high = (np.minimum(side_px, length) / 2, length - np.minimum(side_px, length) / 2)
        anywhere = low + uniform["xy"[axis]] * (high - low)
        middle.append(np.where(real.any(1), np.clip(point[:, axis], low, high), anywhere))
    return middle


def cut(
    images: Float[Tensor, "batch 3 height width"], drawn: Drawn, policy: ViewPolicy
) -> Float[Tensor, "batch 3 crop crop"]:
    """The drawn squares, resampled once; beyond the patch lies its mirror image."""
    height, width = images.shape[2:]
    # So many samples a side for each pixel that no pixel of the patch is stepped over.
    largest = math.sqrt(policy.scale[1] * height * width)
    fine = max(1, math.ceil(largest / policy.crop_px - 1e-6))
    count = policy.crop_px * fine
    step = (torch.arange(count, device=images.device) + 0.5) / count - 0.5  # -0.5 to 0.5
    right, down = drawn.side_px * drawn.mirror_x, drawn.side_px * drawn.mirror_y
    cosine, sine = np.cos(drawn.angle), np.sin(drawn.angle)

    def axis(middle: np.ndarray, right: np.ndarray, down: np.ndarray, length: int) -> Tensor:
        # grid_sample's coordinates: -1 and 1 are the outer edges of the patch.
        terms = (2 * middle / length - 1, 2 * right / length, 2 * down / length)
        start, along, across = (images.new_tensor(term).view(-1, 1, 1) for term in terms)
        return start + along * step + across * step[:, None]

    x = axis(drawn.x, right * cosine, -down * sine, width)
    y = axis(drawn.y, right * sine, down * cosine, height)
    grid = torch.stack([x, y], dim=-1)
    samples = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(samples, fine)


def recolour(
    views: Float[Tensor, "batch 3 crop crop"], drawn: Drawn
) -> Float[Tensor, "batch 3 crop crop"]:
    """Jitter, gray, blur and solarize those views for which they were drawn; values 0 to 1."""
    views = _where(drawn.jitter, views, lambda chosen, rows: _jitter(chosen, drawn, rows))
    views = _where(drawn.gray, views, lambda chosen, _: rgb_to_grayscale(chosen).expand_as(chosen))
    views = _where(drawn.blur, views, lambda chosen, rows: _blur(chosen, drawn.sigma_px[rows]))
    return _where(drawn.solarize, views, lambda chosen, _: solarize(chosen, SOLARIZE_ABOVE))


def _where(
    applies: np.ndarray, views: Tensor, change: Callable[[Tensor, np.ndarray], Tensor]
) -> Tensor:
    rows = np.flatnonzero(applies)
    if not len(rows):
        return views
    index = torch.from_numpy(rows).to(views.device)
    return views.index_copy(0, index, change(views[index], rows))


def _jitter(views: Tensor, drawn: Drawn, rows: np.ndarray) -> Tensor:
    names = ("brightness", "contrast", "saturation", "hue")
    brightness, contrast, saturation, hue = (
        views.new_tensor(getattr(drawn, name)[rows]) for name in names
    )
    views = adjust_brightness_accumulative(views, brightness)
    # kornia's contrast takes a float mean, whose bits depend on the batch; integers add up exactly.
    steps = (rgb_to_grayscale(views) * 2**24).round().long().sum((1, 2, 3), keepdim=True)
    mean = steps / (2**24 * views[0, 0].numel())
    views = torch.lerp(mean, views, contrast.view(-1, 1, 1, 1)).clamp(0, 1)
    views = adjust_saturation_with_gray_subtraction(views, saturation)
    return adjust_hue(views, hue)


def _blur(views: Tensor, sigma_px: np.ndarray) -> Tensor:
    sigma = views.new_tensor(sigma_px)[:, None].expand(-1, 2)
    return gaussian_blur2d(views, (BLUR_PX, BLUR_PX), sigma)
