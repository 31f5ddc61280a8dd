"""Flags at a wrong mpp: radius and count together, and what a detector really finds."""

from dataclasses import replace

import numpy as np
import pytest

from stages.common import flags, params, tally
from stages.common.tally import Tally
from stages.detectors import hematoxylin
from stages.sources import synthetic
from tests.common.test_flags import slide, words


def varied(middle_um: float) -> dict[str, Tally]:
    """Slides whose radii and counts vary as those of several patients do; 8 nuclei per patch."""
    return {
        f"s{at}": slide(8 + 1.5 * (at % 3 - 1), middle_um * (0.87 + 0.09 * (at % 4)))
        for at in range(20)
    }


@pytest.mark.parametrize(
    ("middle_um", "radius_um", "per_patch", "word"),
    [(3.25, 4.95, 3.2, "large nuclei"), (4.2, 2.75, 17.5, "small nuclei")],
)
def test_radius_and_count_together_stand_out_where_neither_does_alone(
    middle_um, radius_um, per_patch, word
):
    even = varied(middle_um)
    assert (
        words({**even, "radius": slide(8, radius_um), "count": slide(per_patch, middle_um)}) == {}
    )
    opposed = slide(15 if per_patch < 8 else 4, radius_um)  # wide and many is no matter of scale
    assert words({**even, "opposed": opposed}) == {}
    found = flags.find({**even, "wrong": slide(per_patch, radius_um)})
    assert {name: list(flags) for name, flags in found.items() if flags} == {"wrong": [word]}
    assert f"µm, and {per_patch} lie in a patch, where " in found["wrong"][word]
    assert "as another scale makes them: its mpp in cohort.csv may be" in found["wrong"][word]


DRAWN_MPP, PATCH_UM = 0.5, 112.0


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Ten crowded slides."""
    settings = params.load(synthetic.Params, "cohort.synthetic")
    settings = replace(settings, width_px=512, height_px=512, mpp=DRAWN_MPP, cluster_share=0.0)
    settings = replace(settings, cells_per_mm2=1500.0, empty_share=0.0)
    return [synthetic.draw(False, np.random.default_rng([5, at]), settings)[0] for at in range(10)]


@pytest.fixture(scope="module")
def right(drawn) -> dict[str, Tally]:
    return {f"s{at}": detected(image, DRAWN_MPP) for at, image in enumerate(drawn[1:])}


def detected(image: np.ndarray, stated_mpp: float) -> Tally:
    own = params.load(hematoxylin.Params, "detect.hematoxylin")
    radii = hematoxylin.build(own)(image[None], stated_mpp)[0].radius_um
    patches = max(1, round(image.shape[0] * image.shape[1] * (stated_mpp / PATCH_UM) ** 2))
    limits = {"least": own.min_radius_um, "most": own.max_radius_um}
    return tally.of(patches, np.arange(len(radii)) % patches, radii, limits)


@pytest.mark.parametrize(
    ("factor", "word"),
    [(0.5, "small nuclei"), (0.67, "small nuclei"), (1.5, "large nuclei"), (2.0, "large nuclei")],
)
def test_what_the_detector_finds_at_a_wrong_mpp_is_flagged(drawn, right, factor, word):
    """Its limits on the radius squeeze the median: at half of the mpp to 0.6 of the right one."""
    assert min(one.nuclei for one in right.values()) > 60
    found = flags.find({**right, "wrong": detected(drawn[0], factor * DRAWN_MPP)})
    assert word in found["wrong"] and not any(found[slide_id] for slide_id in right)
