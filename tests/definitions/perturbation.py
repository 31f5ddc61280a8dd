"""Nuclei-Centered Perturbation, Step 2 of Algorithm 1, pixel by pixel in Python's own integers."""

import math


def splitmix64(seed: int, count: int) -> list[int]:
    """The first outputs of Vigna's splitmix64.c started at `seed`."""
    state, outputs = seed % 2**64, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def is_kept(row: int, column: int, points: list[tuple[float, float]], radius: float) -> bool:
    """Whether the pixel's centre is within the radius of a point, in 1/256 px."""
    for x, y in points:
        if math.isnan(x) or math.isnan(y):
            continue
        x, y = (max(-(2**20), min(2**20, value)) for value in (x, y))
        dx = 256 * column + 128 - round(256 * x)
        dy = 256 * row + 128 - round(256 * y)
        if dx * dx + dy * dy <= round(256 * radius) ** 2:
            return True
    return False


def perturb(
    image: list[list[tuple[int, int, int]]],
    points: list[tuple[float, float]],
    radius: float,
    seed: int,
) -> list[list[tuple[int, int, int]]]:
    """`image` is rows of RGB triples."""
    height, width = len(image), len(image[0])
    keys = [output >> 33 for output in splitmix64(seed, height * width)]
    outside = [
        (row, column)
        for row in range(height)
        for column in range(width)
        if not is_kept(row, column, points, radius)
    ]
    drawn = sorted(outside, key=lambda place: (keys[place[0] * width + place[1]], place))
    result = [list(line) for line in image]
    for (row, column), (from_row, from_column) in zip(outside, drawn, strict=True):
        result[row][column] = image[from_row][from_column]
    return result
