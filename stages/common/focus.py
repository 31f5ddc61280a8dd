"""How sharp an image is, as the blur of its edges in microns, whatever is shown and however pale.

An edge of optical density that is blurred with a Gaussian of standard deviation s has gradients
whose square, summed across it, goes as 1 / s. Blurred once more with a known t it goes as
1 / sqrt(s^2 + t^2): the ratio of both sums gives s, contrast and length of the edge cancel. Noise
is kept out by counting only where the blurred image still has a gradient.
Source: the re-blurring of Zhuo and Sim, Defocus map estimation from a single image, 2011, with sums
of squares in place of single pixels.
"""

import cv2
import numpy as np
from jaxtyping import Float, Float32

REBLUR_UM = 1.5  # t, sigma
SMOOTH_UM = 0.5  # sigma, before anything else: noise of the camera and of JPEG
LEAST_GRADIENT = 0.01  # optical density (base 10) per micron, of the image blurred once more

Image = Float32[np.ndarray, "height width"]


def edges(density: Image, um: float) -> tuple[Image, Image]:
    """Squared gradients of the image and of the re-blurred image, 0 where there is no edge.

    Args:
        density: Optical density.
        um: Microns per pixel.
    """
    smooth = cv2.GaussianBlur(density, (0, 0), SMOOTH_UM / um)
    once, again = (
        _squared_gradient(image, um)
        for image in (smooth, cv2.GaussianBlur(smooth, (0, 0), REBLUR_UM / um))
    )
    edge = (again > LEAST_GRADIENT**2).astype(np.float32)
    return once * edge, again * edge


def _squared_gradient(image: Image, um: float) -> Image:
    along_x, along_y = (
        cv2.Sobel(image, cv2.CV_32F, *order, scale=1 / (8 * um)) for order in ((1, 0), (0, 1))
    )
    return along_x**2 + along_y**2


def blur_um(
    once: Float[np.ndarray, " place"], again: Float[np.ndarray, " place"]
) -> Float[np.ndarray, " place"]:
    """Sigma of the blur, from sums over what `edges` gave; NaN where there are no edges."""
    known = again > 0
    ratio = np.divide(again, once, out=np.full(np.shape(again), np.nan), where=known)
    ratio = np.clip(ratio, 0, 0.999)
    return REBLUR_UM * ratio / np.sqrt(1 - ratio**2)
