"""The perturbation against its definition, and the promises that its users rely on."""

import math

import pytest
import torch
from scipy.stats import chi2

from cytossl_core.perturbation import _keys, near_points, perturb
from tests.definitions import perturbation as definition

NAN = float("nan")
INF = float("inf")
SEEDS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 20260101])


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def by_definition(image: torch.Tensor, points: torch.Tensor, radius: float, seed: int):
    rows = [[tuple(pixel) for pixel in line] for line in image.permute(1, 2, 0).tolist()]
    drawn = definition.perturb(rows, [tuple(point) for point in points.tolist()], radius, seed)
    return torch.tensor(drawn, dtype=torch.uint8).permute(2, 0, 1)


def colours(image: torch.Tensor, chosen: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, image[:, chosen].T.tolist()))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (13, 11), (23, 31)])
@pytest.mark.parametrize("radius", [0.0, 0.5, 3.3, 7.0, 100.0])
def test_matches_definition(height, width, radius):
    batch = images(len(SEEDS), height, width)
    points = torch.rand(len(SEEDS), 3, 2, generator=torch.Generator().manual_seed(1)) * 30 - 4
    points[1, 2] = NAN
    points[2, :] = NAN
    points[3, 0] = torch.tensor([width, 0.0])
    got = perturb(batch, points, radius, SEEDS)
    for index, seed in enumerate(SEEDS.tolist()):
        assert torch.equal(got[index], by_definition(batch[index], points[index], radius, seed))


def test_keys_are_the_published_splitmix64():
    # The first outputs for seed 1234567 that Rosetta Code gives for Vigna's C program.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert definition.splitmix64(1234567, 3) == published
    keys = _keys(torch.tensor(1234567), torch.arange(3))
    assert keys.tolist() == [output >> 33 for output in published]


def test_keeps_inside_and_only_moves_outside_colours():
    batch, points = images(3, 37, 41), torch.tensor([[[20.0, 11.0]], [[0.0, 0.0]], [[41.0, 18.2]]])
    got = perturb(batch, points, 9.5, SEEDS[:3])
    kept = near_points(points, 9.5, 37, 41)
    for before, after, inside in zip(batch, got, kept, strict=True):
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(before[:, inside], after[:, inside])
        assert colours(before, ~inside) == colours(after, ~inside)
        assert (before != after).any(0)[~inside].double().mean() > 0.95


def test_disc_has_its_area_and_its_rim():
    centred = near_points(torch.tensor([[[256.0, 256.0]]]), 50.0, 512, 512)
    assert abs(centred.sum().item() - math.pi * 50**2) < 60
    # Pixel centres 3 and 4 away from the point: (3, 4) is on the rim of radius 5.
    on_rim = near_points(torch.tensor([[[10.5, 10.5]]]), 5.0, 21, 21)[0]
    assert on_rim[14, 13] and on_rim[13, 14] and on_rim[10, 15]
    assert not on_rim[14, 14] and not on_rim[10, 16]


@pytest.mark.parametrize("point, count", [((4.5, 2.5), 1), ((4.0, 2.0), 0), ((4.501, 2.5), 1)])
def test_radius_zero_keeps_a_pixel_only_at_its_centre(point, count):
    # 4.501 px is 1152.256 units: it rounds to the pixel's centre.
    assert near_points(torch.tensor([[point]]), 0.0, 5, 7).sum() == count


@pytest.mark.parametrize("point", [(-60.0, 5), (1e9, 5), (INF, 5), (5, -INF), (NAN, 5), (5, NAN)])
def test_far_and_padding_points_keep_nothing(point):
    batch = images(1, 17, 19)
    nowhere = perturb(batch, torch.empty(1, 0, 2), 50.0, SEEDS[:1])
    assert torch.equal(perturb(batch, torch.tensor([[point]]), 50.0, SEEDS[:1]), nowhere)
    assert colours(batch[0], batch[0, 0] >= 0) == colours(nowhere[0], batch[0, 0] >= 0)
    assert not torch.equal(batch, nowhere)


def test_a_disc_over_everything_changes_nothing():
    batch = images(2, 17, 19)
    assert torch.equal(perturb(batch, torch.full((2, 1, 2), 9.0), 65536.0, SEEDS[:2]), batch)


def test_same_result_alone_in_any_order_and_with_other_padding():
    batch, points = images(5, 29, 23), torch.rand(5, 4, 2) * 25
    together = perturb(batch, points, 4.0, SEEDS)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(perturb(batch[order], points[order], 4.0, SEEDS[order]), together[order])
    padded = torch.cat([torch.full((5, 2, 2), NAN), points.flip(1)], dim=1)
    for index in range(5):
        alone = slice(index, index + 1)
        got = perturb(batch[alone], padded[alone], 4.0, SEEDS[alone])
        assert torch.equal(got[0], together[index])


def test_memory_layout_and_point_dtype_do_not_matter():
    batch, points = images(2, 12, 10), torch.tensor([[[3.25, 4.5]], [[9.75, 11.0]]])
    plain = perturb(batch, points, 3.0, SEEDS[:2])
    channels_last = batch.contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(perturb(channels_last, points.to(dtype), 3.0, SEEDS[:2]), plain)


def test_empty_batch_stays_empty():
    empty = torch.empty(0, 3, 5, 7, dtype=torch.uint8)
    assert perturb(empty, torch.empty(0, 2, 2), 3.0, SEEDS[:0]).shape == (0, 3, 5, 7)


def test_different_seeds_give_different_shuffles():
    same = images(1, 16, 16).expand(64, -1, -1, -1)
    got = perturb(same, torch.empty(64, 0, 2), 1.0, torch.arange(64))
    assert len({image.numpy().tobytes() for image in got}) == 64


@pytest.mark.parametrize("step", [1, 2**32, 6364136223846793005])
def test_a_pixel_lands_everywhere_equally_often(step):
    places, trials = 25, 5000
    marks = torch.arange(places, dtype=torch.uint8).view(1, 1, 5, 5).expand(trials, 3, -1, -1)
    seeds = torch.arange(trials) * step
    landed = perturb(marks, torch.empty(trials, 0, 2), 1.0, seeds)[:, 0].flatten(1).argsort(1)
    for pixel in range(places):
        counts = landed[:, pixel].bincount(minlength=places).double()
        statistic = ((counts - trials / places) ** 2 / (trials / places)).sum().item()
        # 75 statistics are tested, so each at one in a million.
        assert chi2.sf(statistic, places - 1) > 1e-6, (pixel, counts)


def test_neighbours_do_not_stay_together():
    side = 64
    index = torch.arange(side * side).view(1, 1, side, side)
    image = torch.cat([index // 256, index % 256, index * 0], 1).to(torch.uint8)
    got = perturb(image, torch.empty(1, 0, 2), 1.0, SEEDS[:1])[0].long()
    source = (got[0] * 256 + got[1]).flatten().double()
    pair = torch.corrcoef(torch.stack([source[:-1], source[1:]]))[0, 1].item()
    assert abs(pair) < 5 / side  # five standard errors
    assert abs(torch.corrcoef(torch.stack([source, index.flatten().double()]))[0, 1]) < 5 / side


@pytest.mark.parametrize("radius", [-1.0, NAN, INF, 65537.0])
def test_rejects_a_radius_out_of_range(radius):
    with pytest.raises(ValueError, match="radius_px is .* from 0 to 65536"):
        perturb(images(1, 3, 3), torch.zeros(1, 1, 2), radius, SEEDS[:1])


@pytest.mark.gpu
def test_same_bits_on_cpu_and_gpu():
    batch, points = images(5, 251, 263), torch.rand(5, 9, 2) * 300 - 20
    points[0, 3:] = NAN
    expected = perturb(batch, points, 31.7, SEEDS)
    on_gpu = perturb(batch.cuda(), points.cuda(), 31.7, SEEDS.cuda())
    assert torch.equal(on_gpu.cpu(), expected)
