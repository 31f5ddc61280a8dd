"""Nyström attention of one bag, landmark by landmark: Xiong et al. 2021, algorithm 1.

Written apart from stages/heads, on float64 tensors so that gradients can be had too.
"""

import math

import torch


def attention(queries, keys, values, landmarks, iterations, masked):
    """Of each head what every token gets [token][width], and its weights [token][token]."""
    means = [
        (landmarks_of(query, landmarks, masked), landmarks_of(key, landmarks, masked))
        for query, key in zip(queries, keys, strict=True)
    ]
    middles = [softmax_rows(*pair) for pair in means]
    largest = [max(middle.sum(axis).max() for middle in middles) for axis in (0, 1)]
    found = []
    for at, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        landmark_query, landmark_key = means[at]
        if not masked:
            zeros = torch.zeros(-len(key) % landmarks, key.shape[1], dtype=key.dtype)
            key, value = torch.cat([zeros, key]), torch.cat([zeros, value])
        middle = inverse(middles[at], iterations, largest[0] * largest[1])
        last = softmax_rows(landmark_query, key)
        weights = softmax_rows(query, landmark_key) @ middle @ last
        found.append((weights @ value, weights[:, -len(query) :]))
    return found


def landmarks_of(tokens, count, masked):
    """Means of neighbours; rows of zeros stand in front of the first token."""
    each = math.ceil(len(tokens) / count)
    rows = [None] * (each * count - len(tokens)) + list(range(len(tokens)))
    means = []
    for at in range(count):
        real = [row for row in rows[at * each : (at + 1) * each] if row is not None]
        if real or not masked:
            total = sum((tokens[row] for row in real), torch.zeros_like(tokens[0]))
            means.append(total / (len(real) if masked else each))
    return torch.stack(means)


def softmax_rows(query, key):
    """Softmax over keys, a query at a time."""
    rows = []
    for q in query:
        power = torch.stack([torch.exp(torch.dot(q, k) / math.sqrt(len(q))) for k in key])
        rows.append(power / power.sum())
    return torch.stack(rows)


def inverse(matrix, iterations, start):
    """Z of the published iteration; `start` is the product of the largest sums over all heads."""
    found, unit = matrix.T / start, torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(iterations):
        a_z = matrix @ found
        found = 0.25 * found @ (13 * unit - a_z @ (15 * unit - a_z @ (7 * unit - a_z)))
    return found
