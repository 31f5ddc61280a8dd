"""Detectors: what they find on drawn and on real nuclei, and how finds are counted."""

import itertools
from dataclasses import asdict, replace
from importlib import metadata

import cv2
import numpy as np
import pytest
import torch

from benchmarks import detection
from stages.common import plugins
from stages.detectors import Detection, _identity, _score, hematoxylin
from stages.sources import synthetic

PARAMS = hematoxylin.Params(
    channel="auto",
    min_radius_um=1.8,
    max_radius_um=9.0,
    min_contrast=0.04,
    strictness=0.97,
    min_blueness=1.2,
    merge_um=7.0,
)
SMEAR = synthetic.Params(
    slides=2,
    width_px=1021,
    height_px=1031,
    mpp=0.25,
    positive_share=0.5,
    abnormal_share=0.08,
    cells_per_mm2=300.0,
    neutrophils_per_mm2=100.0,
    cluster_share=0.5,
    empty_share=0.35,
    stain_spread=1.0,
    defocus_um=0.8,
    jpeg_quality=88,
)
BACKGROUND, NUCLEUS, RED_CELL = (235, 230, 238), (62, 50, 110), (150, 75, 85)


@pytest.fixture(autouse=True)
def one_thread():
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(before[0])
    torch.set_num_threads(before[1])


def smear(
    discs: list[tuple[float, float, float]],
    mpp: float,
    side_um: float = 61.0,
    colour: tuple[int, int, int] = NUCLEUS,
    background: tuple[int, int, int] = BACKGROUND,
) -> np.ndarray:
    """Discs given as (x, y, radius) in microns on a plain ground, drawn finely, then shrunk."""
    fine = 8
    side = round(side_um / mpp)
    image = np.full((side * fine, side * fine, 3), background, np.uint8)
    centre = (np.arange(side * fine) + 0.5) / fine * mpp
    for x, y, radius in discs:
        image[np.hypot(centre[None] - x, centre[:, None] - y) <= radius] = colour
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def found(image: np.ndarray, mpp: float, **changes) -> Detection:
    return hematoxylin.build(replace(PARAMS, **changes))(image[None], mpp)[0]


# scoring


def largest_matching(first: np.ndarray, second: np.ndarray, radius: float) -> int:
    """By definition: the best over every way to give the fewer points distinct partners."""
    few, many = sorted((first.tolist(), second.tolist()), key=len)
    return max(
        sum(np.hypot(a[0] - b[0], a[1] - b[1]) <= radius for a, b in zip(few, order, strict=True))
        for order in itertools.permutations(many, len(few))
    )


def test_match_counts_the_largest_one_to_one_matching():
    rng = np.random.default_rng(3)
    for _ in range(100):
        first, second = (rng.uniform(0, 7, (rng.integers(0, 6), 2)) for _ in range(2))
        counts = _score.match(first, second, 2.0)
        assert counts == _score.Counts(
            largest_matching(first, second, 2.0), len(first), len(second)
        )


def test_match_is_not_greedy_and_counts_the_rim_as_near():
    """The nearest pair first would leave the outer points alone."""
    annotated, detections = np.array([[0.0, 0], [3, 0]]), np.array([[2.0, 0], [5, 0]])
    assert _score.match(detections, annotated, 2.0).matched == 2
    assert _score.match(detections, annotated, 1.999).matched == 1


def test_scores_by_hand():
    counts = _score.Counts(3, 4, 6) + _score.Counts(0, 1, 0)
    assert (counts.precision, counts.recall, counts.f1) == (3 / 5, 3 / 6, 6 / 11)
    nothing = _score.Counts(0, 0, 0)
    assert (nothing.precision, nothing.recall, nothing.f1) == (1, 1, 1)


# hematoxylin on drawn discs


@pytest.mark.parametrize("mpp", [0.13, 0.25, 0.37, 0.5, 0.8])
def test_finds_centre_and_radius_in_microns_at_any_scale(mpp):
    """Centres within 0.3 um, and so within a pixel; half a pixel of shift would be seen."""
    discs = [(13.0, 17.5, 3.0), (41.25, 12.0, 4.5), (29.0, 48.5, 6.0)]
    nuclei = found(smear(discs, mpp), mpp)
    order = np.argsort(nuclei.radius_um)
    centre_um = nuclei.centroid_px[order] * mpp
    assert np.abs(centre_um - np.array(discs)[:, :2]).max() < 0.3 * max(1, mpp / 0.5)
    assert np.abs(nuclei.radius_um[order] - np.array(discs)[:, 2]).max() < 0.6
    assert nuclei.centroid_px.dtype == nuclei.radius_um.dtype == nuclei.score.dtype == np.float32


def test_centres_have_no_bias():
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(20):
        x, y = rng.uniform(20, 40, 2)
        errors.append(found(smear([(x, y, 4.0)], 0.25), 0.25).centroid_px[0] * 0.25 - (x, y))
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02  # a twelfth of a pixel


def test_leaves_what_is_smaller_or_larger_than_a_nucleus():
    discs = [(12.0, 12.0, 1.0), (45.0, 40.0, 13.0), (15.0, 50.0, 4.0)]
    nuclei = found(smear(discs, 0.25), 0.25)
    assert np.abs(nuclei.centroid_px * 0.25 - (15, 50)).max() < 0.3 and len(nuclei.score) == 1


def test_radii_in_params_answer_for_a_wrong_scale():
    image = smear([(20.0, 20.0, 3.5), (45.0, 45.0, 4.0)], 0.25)
    assert len(found(image, 0.125).score) == 0 or found(image, 0.125).radius_um.max() < 2.4
    for wrong in (0.125, 0.5):
        share = wrong / 0.25
        nuclei = found(
            image,
            wrong,
            min_radius_um=PARAMS.min_radius_um * share,
            max_radius_um=PARAMS.max_radius_um * share,
            merge_um=PARAMS.merge_um * share,
        )
        assert len(nuclei.score) == 2


def test_a_dim_lamp_and_a_tinted_ground_change_nothing():
    discs = [(20.0, 20.0, 3.5), (45.0, 45.0, 4.0)]
    bright = found(smear(discs, 0.25), 0.25)
    tint = np.array([0.45, 0.4, 0.5])
    dim = (smear(discs, 0.25) * tint).round().astype(np.uint8)
    assert np.abs(found(dim, 0.25).centroid_px - bright.centroid_px).max() < 0.2
    assert np.abs(found(dim, 0.25).radius_um - bright.radius_um).max() < 0.1


def test_red_cells_do_not_fire_and_colour_is_what_decides():
    image = smear([(20.0, 20.0, 3.7), (45.0, 45.0, 3.7)], 0.25, colour=RED_CELL)
    assert len(found(image, 0.25).score) == 0
    assert len(found(image, 0.25, min_blueness=0.1).score) == 2


def test_lobes_of_one_nucleus_are_one():
    lobes = [(27.0, 30.0, 2.7), (32.2, 31.0, 2.7)]
    nuclei = found(smear([*lobes, (50.0, 15.0, 3.0)], 0.25), 0.25)
    assert len(nuclei.score) == 2
    assert len(found(smear(lobes, 0.25), 0.25, merge_um=3.0).score) == 2


def test_touching_nuclei_are_cut_apart():
    nuclei = found(smear([(26.0, 30.0, 4.5), (34.0, 30.0, 4.5)], 0.25), 0.25)
    assert np.abs(np.sort(nuclei.centroid_px[:, 0]) * 0.25 - (26, 34)).max() < 0.7


def test_the_darker_scores_higher_within_0_and_1():
    pale = smear([(20.0, 20.0, 4.0)], 0.25, colour=(150, 140, 190))
    dark = smear([(45.0, 45.0, 4.0)], 0.25)
    nuclei = found(np.minimum(pale, dark), 0.25, strictness=0.4)
    score = nuclei.score[np.argsort(nuclei.centroid_px[:, 0])]
    assert len(score) == 2 and 0 < score[0] < score[1] < 1


@pytest.mark.parametrize("gray", [0, 3, 128, 255])
@pytest.mark.parametrize("channel", ["auto", "minimum", "red", "hematoxylin"])
def test_finds_nothing_in_a_plain_patch(gray, channel):
    nuclei = found(np.full((61, 67, 3), gray, np.uint8), 0.25, channel=channel)
    assert nuclei.centroid_px.shape == (0, 2) and nuclei.score.shape == (0,)


def test_finds_nothing_in_sensor_noise():
    noise = np.random.default_rng(0).normal(200, 6, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    assert len(found(noise, 0.25).score) == 0


def test_finds_thousands():
    grid = np.arange(7.0, 860, 12.0)
    discs = [(x, y) for x in grid for y in grid]
    image = np.full((1720, 1720, 3), BACKGROUND, np.uint8)
    for x, y in discs:
        cv2.circle(image, (int(x * 2), int(y * 2)), 6, NUCLEUS, -1, cv2.LINE_AA)
    nuclei = found(image, 0.5)
    counts = _score.match(nuclei.centroid_px.astype(float) * 0.5, np.array(discs), 1.5)
    assert len(discs) == 72**2 and counts.precision > 0.999 and counts.recall > 0.999


def test_a_patch_is_treated_alike_whatever_others_are_given():
    patches = np.stack([smear([(x, 30.0, 4.0)], 0.5) for x in (10.0, 20.0, 50.0)])
    detector = hematoxylin.build(PARAMS)
    together = detector(patches, 0.5)
    for patch, nuclei in zip(patches, together, strict=True):
        alone = detector(patch[None], 0.5)[0]
        for name in ("centroid_px", "radius_um", "score"):
            assert np.array_equal(getattr(alone, name), getattr(nuclei, name))
    assert detector(patches[:0], 0.5) == []


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 9, 9), np.uint8), ((2, 9, 9, 4), np.uint8), ((2, 9, 9, 3), np.uint16), ((9, 9, 3), int)],
    ids=["gray", "RGBA", "16 bits", "single"],
)
def test_rejects_all_but_stacks_of_uint8_rgb(shape, dtype):
    with pytest.raises(ValueError, match="patches are .* must be uint8 .*RGB.*drop alpha"):
        hematoxylin.build(PARAMS)(np.zeros(shape, dtype), 0.25)


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_rejects_a_scale_that_is_not_positive(mpp):
    with pytest.raises(ValueError, match="mpp is .* above 0"):
        hematoxylin.build(PARAMS)(np.zeros((1, 9, 9, 3), np.uint8), mpp)


def test_rejects_params_that_no_nucleus_meets():
    for name in ("min_radius_um", "min_contrast", "strictness", "merge_um"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"detect.hematoxylin.{name} is .* above 0"):
                replace(PARAMS, **{name: value})
    with pytest.raises(ValueError, match=r"max_radius_um is 1.5: it must be above min_radius_um"):
        replace(PARAMS, max_radius_um=1.5)


# hematoxylin on smears


def test_finds_the_nuclei_of_drawn_smears():
    counts = detection.score(hematoxylin.build(PARAMS), detection.drawn(SMEAR, 3), 0.5, 8.0)
    total = sum(counts, _score.Counts(0, 0, 0))
    assert total.annotated > 40 and total.f1 > 0.80


def test_finds_nuclei_of_real_liquid_cytology(shared_data):
    """On the half of the fields that the params were not chosen on."""
    fields = detection.lbc_nuclei(shared_data, begin=1)
    counts = detection.score(hematoxylin.build(PARAMS), fields, detection.LBC_MPP, 8.0)
    assert len(counts) == 8 and detection.macro_f1(counts) > 0.83


def test_finds_white_cells_of_real_blood_films(shared_data):
    fields = list(itertools.islice(detection.bccd(shared_data, begin=1), 40))
    counts = detection.score(
        hematoxylin.build(PARAMS), fields, detection.BCCD_MPP, detection.BCCD_RADIUS_PX
    )
    assert sum(counts, _score.Counts(0, 0, 0)).f1 > 0.80


def test_real_red_cells_do_not_fire(shared_data):
    """Some 70 red cells a field; one field of 35 is so blue that a third of its cells do."""
    fields = detection.chula(shared_data)
    counts = detection.score(hematoxylin.build(PARAMS), fields, detection.CHULA_MPP, 1.0)
    assert np.median([one.found for one in counts]) == 0
    assert sum(one.found <= 2 for one in counts) >= 34


# every detector


def test_the_library_of_each_detector_is_in_its_version():
    for name in plugins.names("detectors"):
        plugin = plugins.load("detectors", name)
        line = _identity.of(name, plugin.VERSION, plugin.LIBRARIES, "d1")
        assert line.startswith(f"{name} {plugin.VERSION}, ") and line.endswith(", weights d1")
        assert f"scipy {metadata.version('scipy')}" in line
        assert f"opencv-python-headless {metadata.version('opencv-python-headless')}" in line
        assert "absent" not in line.replace("cellpose absent", "")  # an extra
    assert hematoxylin.build(PARAMS).version == hematoxylin.identity(PARAMS)


def test_plug_ins_are_found_by_name():
    assert {"hematoxylin", "cellpose"} <= set(plugins.names("detectors"))
    assert plugins.load("detectors", "hematoxylin").Params is hematoxylin.Params
    assert asdict(PARAMS)["channel"] == "auto"
