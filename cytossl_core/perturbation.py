"""Nuclei-Centered Perturbation: keep the discs around some points, shuffle every other pixel.

The result is a pure function of (image, points, radius, seed), spelled out here in integers, so
that it can be written again in any language and gives the same bits on every device:

1. Fixed point. A coordinate is clamped to +-2**20 px and becomes round(256 * coordinate), ties to
   even; so does the radius. The centre of pixel (row i, column j) is (256 j + 128, 256 i + 128).
2. A pixel is kept if, for any point, dx**2 + dy**2 <= radius**2 between its centre and the point.
3. The other pixels, taken in order of p = i * width + j, are p_0 < p_1 < ... Each has a key, the
   upper 31 bits of the (p + 1)-th output of SplitMix64 started at the image's seed (mod 2**64).
4. Sorted by (key, p) they are q_0, q_1, ... and output pixel p_n is input pixel q_n, whole RGB.

Only 31 bits are sorted because 32-bit sorts are several times faster; in a 512 px patch some 16
pairs of 262,144 keys tie and then keep their order, which no statistic of the shuffle can see.
"""

import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

_UNITS = 256  # fixed-point units per pixel
_FAR_PX = 2**20  # points further out are moved here, so that squares stay inside int64
_RADIUS_MAX_PX = 2**16
# SplitMix64 (Steele et al. 2014): its step, then (shift, factor) thrice, as signed 64-bit numbers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def perturb(
    images: UInt8[Tensor, "batch 3 height width"],
    points: Float[Tensor, "batch point 2"],
    radius_px: float,
    seeds: Int64[Tensor, " batch"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Shuffle the pixels of each image that lie outside every disc around its points.

    Args:
        images: RGB patches, 0 to 255.
        points: (x, y) of the retained nuclei in patch pixels, x the column; the centre of pixel
            column j is j + 0.5. A row with a NaN is padding. An image without any point is
            shuffled everywhere; a point outside the image keeps whatever part of its disc is in.
        radius_px: Radius of the kept discs, 0 to 65536 pixels (50 at 40x in the paper).
        seeds: One number per image, any int64; equal seeds on equal images give equal results,
            whatever else is in the batch.

    Returns:
        Images of the same shape: the kept pixels untouched, the others permuted among themselves.

    Raises:
        ValueError: radius_px is negative, not finite or above 65536.

    Source:
        Cyto-SSL, Algorithm 1 line 2 and Step 2. The paper says neither how the pixels are
        shuffled nor where a disc ends; the module docstring does.
    """
    kept = near_points(points, radius_px, images.shape[2], images.shape[3]).flatten(1)
    pixels = images.flatten(2)  # [batch, 3, pixel]
    # One image at a time: a sort of a single row is the fast one, and the outsides differ in size.
    shuffled = [_shuffle(*image) for image in zip(pixels, kept, seeds, strict=True)]
    return torch.stack(shuffled).view(images.shape) if shuffled else images.clone()


def near_points(
    points: Float[Tensor, "batch point 2"], radius_px: float, height: int, width: int
) -> Bool[Tensor, "batch height width"]:
    """The pixels whose centres lie within `radius_px` of any point: those `perturb` keeps.

    Args:
        points: (x, y) in patch pixels; a row with a NaN is padding.
        radius_px: 0 to 65536 pixels, the rim included.
        height: Of the mask, pixels.
        width: Of the mask, pixels.

    Raises:
        ValueError: radius_px is negative, not finite or above 65536.
    """
    if not 0 <= radius_px <= _RADIUS_MAX_PX:
        raise ValueError(f"radius_px is {radius_px}: it must be from 0 to {_RADIUS_MAX_PX} pixels")
    padding = points.isnan().any(2)
    units = (points.double().nan_to_num(0).clamp(-_FAR_PX, _FAR_PX) * _UNITS).round().long()
    dx2 = (_centres(width, points.device) - units[..., 0, None]).square()  # [batch, point, width]
    dy2 = (_centres(height, points.device) - units[..., 1, None]).square()
    room = (round(radius_px * _UNITS) ** 2 - dy2).masked_fill(padding[..., None], -1)
    near = torch.zeros(len(points), height, width, dtype=torch.bool, device=points.device)
    for point in range(points.shape[1]):
        near |= dx2[:, point, None, :] <= room[:, point, :, None]
    return near


def _centres(count: int, device: torch.device) -> Int64[Tensor, " pixel"]:
    return torch.arange(count, device=device) * _UNITS + _UNITS // 2


def _shuffle(
    pixels: UInt8[Tensor, "3 pixel"], kept: Bool[Tensor, " pixel"], seed: Int64[Tensor, ""]
) -> UInt8[Tensor, "3 pixel"]:
    outside = kept.logical_not().nonzero()[:, 0]
    order = _keys(seed, outside).argsort(stable=True)
    source = torch.arange(len(kept), device=pixels.device)
    source.scatter_(0, outside, outside.gather(0, order))  # half the time of source[outside] = ...
    return pixels.gather(1, source.expand(3, -1))


def _keys(seed: Int64[Tensor, ""], pixel: Int64[Tensor, " pixel"]) -> Int32[Tensor, " pixel"]:
    # Int64 wraps around, as SplitMix64 asks. In place: fresh memory costs more than the arithmetic.
    state = (pixel + 1).mul_(_STEP).add_(seed)
    shifted = torch.empty_like(state)
    for bits, factor in _ROUNDS:
        # The mask makes the shift logical: torch's own copies the sign into the bits it frees.
        torch.bitwise_right_shift(state, bits, out=shifted).bitwise_and_(2 ** (64 - bits) - 1)
        state.bitwise_xor_(shifted).mul_(factor)
    return torch.bitwise_right_shift(state, 33, out=shifted).bitwise_and_(2**31 - 1).int()
