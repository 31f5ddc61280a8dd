"""Views: where they are cut, what is drawn for them, and that a batch changes nothing."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest
from torchvision.transforms.v2 import functional as tv

from stages.common import chance
from stages.common.views import Drawn, ViewPolicy, cut, draw, make_views, recolour

PX = 41
PLAIN = ViewPolicy(1, PX, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
DINO = ViewPolicy(2, 23, (0.1, 0.6), 180.0, 0.5, 0.8, 0.2, 0.5, 0.2)
NO_POINTS = torch.full((1, 1, 2), float("nan"))
AS_IS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std


def patches(batch: int, height: int = PX, width: int = PX) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def keys(count: int) -> torch.Tensor:
    return chance.keys_of(7, 0, torch.arange(count))


def drawn_for(policy: ViewPolicy, points: torch.Tensor, extent=(PX, PX), number: int = 0) -> Drawn:
    return draw(points, keys(len(points)), number, policy, extent)


def test_without_augmentation_a_patch_of_the_crops_size_is_its_own_view():
    batch = patches(3)
    [view] = make_views(batch, NO_POINTS.expand(3, -1, -1), keys(3), [PLAIN], *AS_IS)
    torch.testing.assert_close(view, batch / 255, rtol=0, atol=2e-5)


def test_views_are_normalised():
    batch, mean, std = patches(2), (0.5, 0.25, 0.125), (0.5, 2.0, 4.0)
    [view] = make_views(batch, NO_POINTS.expand(2, -1, -1), keys(2), [PLAIN], mean, std)
    expected = (batch / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_and_mirrors_agree_with_torch(turns):
    images = patches(1) / 255
    drawn = replace(drawn_for(PLAIN, NO_POINTS), angle=np.array([turns * np.pi / 2]))
    got = cut(images, drawn, PLAIN)
    torch.testing.assert_close(got, torch.rot90(images, turns, (2, 3)), rtol=0, atol=5e-5)
    for axis, name in ((3, "mirror_x"), (2, "mirror_y")):
        mirrored = cut(images, replace(drawn, **{name: np.array([-1.0])}), PLAIN)
        # The view is mirrored first and turned after.
        torch.testing.assert_close(mirrored, got.flip(axis), rtol=0, atol=5e-5)


def test_the_chosen_point_lands_in_the_middle_of_the_view():
    policy = replace(PLAIN, crop_px=15, scale=(0.04, 0.09), rotation_degrees=180.0, flip=0.5)
    count, height, width = 40, 67, 53
    generator = torch.Generator().manual_seed(0)
    pixel = torch.randint(15, 38, (count, 2), generator=generator)
    images = torch.zeros(count, 3, height, width)
    images[torch.arange(count), :, pixel[:, 1], pixel[:, 0]] = 1
    drawn = drawn_for(policy, pixel[:, None] + 0.5, (height, width))
    assert np.allclose(np.stack([drawn.x, drawn.y], 1), pixel + 0.5)
    views = cut(images, drawn, policy)[:, 0]
    brightest = views.flatten(1).argmax(1)
    assert brightest.tolist() == [7 * 15 + 7] * count


def test_a_crop_is_moved_into_the_patch():
    policy = replace(PLAIN, scale=(0.25, 0.25))
    corner = torch.tensor([[[0.0, 40.0]], [[39.0, -9.0]], [[20.0, 21.0]]])
    drawn = drawn_for(policy, corner)
    assert drawn.side_px.tolist() == [PX / 2] * 3
    assert drawn.x.tolist() == [PX / 4, 3 * PX / 4, 20.0]
    assert drawn.y.tolist() == [3 * PX / 4, PX / 4, 21.0]
    # A square larger than the narrow side of a patch stands in its middle.
    wide = drawn_for(PLAIN, torch.tensor([[[3.0, 3.0]]]), (10, 90))
    assert wide.side_px.item() == 30 and wide.x.item() == 15 and wide.y.item() == 5


def test_each_point_is_chosen_equally_often_and_padding_never():
    nan = float("nan")
    points = torch.tensor([[nan, nan], [10.0, 20.0], [nan, 3.0], [20.0, 20.0], [30.0, 20.0]])
    policy = replace(PLAIN, scale=(0.01, 0.01))
    drawn = drawn_for(policy, points.expand(3000, -1, -1))
    places, counts = np.unique(drawn.x, return_counts=True)
    assert places.tolist() == [10, 20, 30] and np.abs(counts - 1000).max() < 5 * np.sqrt(2000 / 3)
    without = torch.tensor([[10.0, 20.0], [20.0, 20.0], [30.0, 20.0]]).expand(3000, -1, -1)
    assert np.array_equal(drawn.x, drawn_for(policy, without).x)


@pytest.mark.parametrize("points", [NO_POINTS, torch.empty(1, 0, 2)])
def test_crops_without_points_fall_anywhere(points):
    drawn = drawn_for(replace(PLAIN, scale=(0.25, 0.25)), points.expand(2000, -1, -1), (40, 40))
    for place in (drawn.x, drawn.y):
        assert kstest(place, "uniform", (10, 20)).pvalue > 1e-4
    assert abs(np.corrcoef(drawn.x, drawn.y)[0, 1]) < 5 / np.sqrt(2000)


def test_draws_have_their_published_ranges_and_shares():
    count = 4000
    drawn = drawn_for(DINO, NO_POINTS.expand(count, -1, -1))
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.2 * np.pi, 0.2 * np.pi),
        "angle": (-np.pi, np.pi),
        "sigma_px": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        assert kstest(getattr(drawn, name), "uniform", (low, high - low)).pvalue > 1e-4, name
    assert kstest(drawn.side_px**2 / PX**2, "uniform", (0.1, 0.5)).pvalue > 1e-4
    shares = {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.2}
    for name, share in shares.items():
        spread = np.sqrt(count * share * (1 - share))
        assert abs(getattr(drawn, name).sum() - share * count) < 5 * spread, name
    for name in ("mirror_x", "mirror_y"):
        assert abs(getattr(drawn, name).sum()) < 5 * np.sqrt(count), name


@pytest.mark.parametrize("threads", [1, 2])
def test_a_view_is_bit_identical_alone_and_in_any_batch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batch, points = patches(9, 97, 89), torch.rand(9, 3, 2) * 80
    points[3] = float("nan")
    policies = [replace(DINO, crop_px=67, views=1), DINO]
    together = make_views(batch, points, keys(9), policies, *AS_IS)
    for rows in ([4], [3], [8, 0], [5, 6, 7, 1, 2]):
        got = make_views(batch[rows], points[rows], keys(9)[rows], policies, *AS_IS)
        assert len(got) == 3
        for part, whole in zip(got, together, strict=True):
            assert torch.equal(part, whole[rows])
    torch.set_num_threads(before)


def test_views_of_a_patch_differ_and_so_do_epochs_seeds_and_patches():
    batch, points = patches(1), torch.tensor([[[20.0, 20.0]]])
    seen = set()
    for seed, epoch, patch in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (-1, 0, 0)):
        key = chance.keys_of(seed, epoch, torch.tensor([patch]))
        seen |= {view.numpy().tobytes() for view in make_views(batch, points, key, [DINO], *AS_IS)}
    assert len(seen) == 12


def test_keys_do_not_collide():
    found = [chance.keys_of(3, epoch, torch.arange(10_000)) for epoch in range(10)]
    assert torch.cat(found).unique().numel() == 100_000


def test_uniform_numbers_are_uniform_and_independent():
    numbers = chance.uniform(keys(1000), 5, 8)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    counts = np.histogram2d(numbers[0], numbers[1], bins=5, range=[[0, 1]] * 2)[0]
    assert chi2.sf(((counts - 40) ** 2 / 40).sum(), 24) > 1e-6
    assert np.abs(np.corrcoef(numbers) - np.eye(8)).max() < 5 / np.sqrt(1000)


def test_shrinking_averages_what_it_skips():
    # A checkerboard of single pixels has nothing to show at a quarter of its size.
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    policy = replace(PLAIN, crop_px=16)
    drawn = drawn_for(policy, NO_POINTS, (64, 64))
    plain = cut(board.float().expand(1, 3, -1, -1), drawn, policy)
    assert (plain - 0.5).abs().max() < 1e-3
    turned = replace(drawn, angle=np.array([0.3]))
    inner = cut(board.float().expand(1, 3, -1, -1), turned, policy)[..., 3:-3, 3:-3]
    assert (inner - 0.5).abs().max() < 0.1
    smooth = cv2.GaussianBlur(patches(1, 64, 64)[0, 0].numpy(), (0, 0), 4) / np.float32(255)
    images = torch.from_numpy(smooth).expand(1, 3, -1, -1)
    expected = torch.nn.functional.avg_pool2d(images, 4)
    torch.testing.assert_close(cut(images, drawn, policy), expected, rtol=0, atol=1e-5)


def colours_only(**chosen: float) -> Drawn:
    off = {name: np.zeros(2, bool) for name in ("jitter", "gray", "blur", "solarize")}
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma_px": 1.0}
    values = {name: np.full(2, value) for name, value in {**neutral, **chosen}.items()}
    return replace(drawn_for(PLAIN, NO_POINTS.expand(2, -1, -1)), **{**off, **values})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("brightness", 1.3, lambda views: tv.adjust_brightness(views, 1.3)),
        ("contrast", 0.7, lambda views: tv.adjust_contrast(views, 0.7)),
        ("contrast", 1.4, lambda views: tv.adjust_contrast(views, 1.4)),
        ("saturation", 0.8, lambda views: tv.adjust_saturation(views, 0.8)),
        ("hue", 0.5, lambda views: tv.adjust_hue(views, 0.5 / (2 * np.pi))),
    ],
)
def test_jitter_agrees_with_torchvision(name, value, expected):
    views = patches(2) / 255
    got = recolour(views, colours_only(jitter=True, **{name: value}))
    torch.testing.assert_close(got, expected(views), rtol=0, atol=2e-4)


def test_gray_blur_and_solarize_agree_with_torchvision():
    views = patches(2) / 255
    expected = tv.rgb_to_grayscale(views, 3)
    torch.testing.assert_close(
        recolour(views, colours_only(gray=True)), expected, atol=2e-4, rtol=0
    )
    expected = tv.gaussian_blur(views, [13, 13], [1.7, 1.7])
    got = recolour(views, colours_only(blur=True, sigma_px=1.7))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    expected = torch.where(views < 0.5, views, 1 - views)
    torch.testing.assert_close(recolour(views, colours_only(solarize=True)), expected)


def test_only_the_drawn_views_are_recoloured():
    views = patches(2) / 255
    drawn = replace(colours_only(brightness=1.4), jitter=np.array([False, True]))
    got = recolour(views, drawn)
    assert torch.equal(got[0], views[0]) and not torch.equal(got[1], views[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"views": -1}, "views is -1"),
        ({"crop_px": 12}, "crop_px 12: they must be at least 0, 13"),
        ({"scale": (0.0, 0.5)}, "scale is"),
        ({"scale": (0.6, 0.5)}, "the smaller first"),
        ({"scale": (0.6, 1.1)}, "scale is"),
        ({"blur": 1.5}, "blur is 1.5: it must be from 0 to 1"),
        ({"flip": -0.1}, "flip is -0.1"),
    ],
)
def test_rejects_policies_outside_their_ranges(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    batch, points = patches(5, 97, 89), torch.rand(5, 3, 2) * 80
    policies = [replace(DINO, crop_px=67, solarize=0.0)]  # a threshold may fall either way
    expected = make_views(batch, points, keys(5), policies, *AS_IS)
    got = make_views(batch.cuda(), points, keys(5), policies, *AS_IS)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-3)
