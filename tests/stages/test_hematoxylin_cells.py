"""The classical detector on nuclei in cells of other hues, almost as dark, and without light."""

import cv2
import numpy as np
import pytest

from tests.stages.test_hematoxylin import DISCS, GLASS, centres_um, found, paint, smear

EOSIN, TEAL, DENSE = (225, 130, 175), (130, 160, 180), (70, 105, 110)


@pytest.mark.parametrize(
    ("cell", "above"),
    [(EOSIN, (0.14, 0.25, 0.19)), (TEAL, (0.08, 0.21, 0.09)), (EOSIN, (0.12, 0.22, 0.2))],
    ids=["pyknotic", "purple in teal", "brown"],
)
def test_what_stands_out_from_its_own_cell_is_a_nucleus_whatever_its_hue(cell, above):
    """Density above the cell, by channel, as measured in smears; the same on glass is none."""
    disc = (30.0, 30.0, 3.5)
    image = paint(smear([]), [(30.0, 30.0, 22.0)], 0.5, cell)
    nuclei = found(paint(image, [disc], 0.5, (np.array(cell) * 10 ** -np.array(above)).round()))
    assert np.abs(centres_um(nuclei) - disc[:2]).max() < 0.3
    assert nuclei.radius_um == pytest.approx([3.5], rel=0.1)
    alone = (np.array(GLASS) * 10 ** -np.array(above)).round()
    assert len(found(smear([disc], colour=alone)).score) == 0


@pytest.mark.parametrize("cell_um", [9.6, 10.5, 12.0])
def test_a_nucleus_is_found_in_a_cell_almost_as_dark(cell_um):
    """Half of its density is less than the cell's: at that level the cell itself is cut out."""
    image = paint(smear([]), [(30.0, 30.0, cell_um)], 0.5, DENSE)
    inner = (np.array(DENSE) * 10 ** -np.array([0.22, 0.22, 0.12])).round()
    nuclei = found(paint(image, [(31.0, 30.0, 4.0)], 0.5, inner))
    assert np.abs(centres_um(nuclei) - (31, 30)).max() < 0.3
    assert nuclei.radius_um == pytest.approx([4.0], rel=0.1)


@pytest.mark.parametrize("deviation", [1, 3, 6])
@pytest.mark.parametrize("mean", [0, 2, 5, 10, 15])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
@pytest.mark.parametrize("quality", [85, None])
def test_finds_nothing_where_there_is_no_light(mean, deviation, channels, quality):
    noise = np.random.default_rng(0).normal(mean, deviation, (256, 256, channels))
    dark = noise.clip(0, 255).round().astype(np.uint8).repeat(3 // channels, axis=2)
    if quality:
        packed = cv2.imencode(".jpg", dark, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        dark = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    nuclei = found(dark)
    assert nuclei.centroid_px.shape == (0, 2) and nuclei.outline_px == []


def test_a_lamp_of_a_quarter_still_counts_as_light():
    nuclei = found((smear(DISCS) * 0.25).round().astype(np.uint8))
    assert np.abs(centres_um(nuclei) - np.array(DISCS)[:, :2]).max() < 0.4
