"""The blur of edges in microns: as it was drawn, whatever the contrast, shape and resolution."""

import cv2
import numpy as np
import pytest

from stages.common import focus


def scene(sigma_um: float, um: float, contrast: float) -> np.ndarray:
    """Disks and bars of some density, drawn finely, blurred, and averaged to the resolution."""
    fine = 0.25
    side = round(200 / fine)
    image = np.zeros((side, side), np.float32)
    cv2.circle(image, (side // 4, side // 4), round(25 / fine), contrast, -1)
    cv2.rectangle(image, (side // 2, side // 8), (side - 40, side // 2), contrast, -1)
    cv2.circle(image, (side // 2, 3 * side // 4), round(30 / fine), contrast, -1)
    image = cv2.GaussianBlur(image, (0, 0), sigma_um / fine)
    return cv2.resize(image, None, fx=fine / um, fy=fine / um, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("um", [0.5, 1.0])
@pytest.mark.parametrize("contrast", [0.4, 1.0])
@pytest.mark.parametrize("sigma_um", [1.0, 2.0, 3.0])
def test_the_blur_is_the_one_that_was_drawn(sigma_um, contrast, um):
    once, again = focus.edges(scene(sigma_um, um, contrast), um)
    found = focus.blur_um(once.sum(keepdims=True).ravel(), again.sum(keepdims=True).ravel())
    own = np.hypot(sigma_um, focus.SMOOTH_UM)
    assert found[0] == pytest.approx(own, rel=0.15)


def test_what_is_flat_or_faint_noise_has_no_focus():
    noise = np.random.default_rng(0).normal(0.3, 0.005, (99, 99)).astype(np.float32)
    once, again = (part.sum(keepdims=True).ravel() for part in focus.edges(noise, 1.0))
    assert again[0] == 0 and np.isnan(focus.blur_um(once, again)[0])
