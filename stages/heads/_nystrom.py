"""Softmax attention approximated through landmarks (Nyström), as TransMIL uses it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Nystrom:
    """Attention to some keys and values, ready to be asked.

    Source:
        Xiong et al. 2021, https://arxiv.org/abs/2102.03902, equation 13 and algorithm 1, with
        zeros in front of the tokens up to a multiple of the landmarks, as in nystrom-attention
        0.0.11 and later (earlier versions drop the wrong rows of short bags). Differs from it in
        the start of the inverse, which is each bag's own: there the largest sums of the whole
        batch enter it, so that bags change each other's results.
    """

    landmark_query: Float[Tensor, "batch head landmark width"]
    landmark_key: Float[Tensor, "batch head landmark width"]
    key: Float[Tensor, "batch head key width"]  # with the zeros in front, where they take part
    inverse: Float[Tensor, "batch head landmark landmark"]
    mixed: Float[Tensor, "batch head landmark width"]  # of the values, one row a landmark

    def attend(
        self, query: Float[Tensor, "batch head query width"]
    ) -> Float[Tensor, "batch head query width"]:
        """What each query gets; nothing of the size queries x keys is made."""
        return F.scaled_dot_product_attention(query, self.landmark_key, self.mixed)

    def weights(
        self, query: Float[Tensor, "batch head query width"], tokens: int
    ) -> Float[Tensor, "batch head query token"]:
        """The weight of each of the `tokens` for each query; sums to about 1, may be below 0."""
        to_landmarks = similarity(query, self.landmark_key) @ self.inverse
        return (to_landmarks @ similarity(self.landmark_query, self.key))[..., -tokens:]


def approximate(
    query: Float[Tensor, "batch head token width"],
    key: Float[Tensor, "batch head token width"],
    value: Float[Tensor, "batch head token width"],
    landmarks: int,
    iterations: int,
    masked: bool,
) -> Nystrom:
    """Choose landmarks and invert their attention to each other.

    Args:
        query: One row a token; all bags of the batch have as many.
        key: As `query`.
        value: As `query`.
        landmarks: Means of neighbouring tokens that stand for all tokens.
        iterations: Of the pseudo-inverse.
        masked: Leave the zeros in front out of means and sums, and landmarks of zeros only out
            altogether. False is the official form, where they take part as keys.
    """
    landmark_query, landmark_key = (_landmarks(rows, landmarks, masked) for rows in (query, key))
    if not masked:
        zeros = -key.shape[2] % landmarks
        key, value = (F.pad(rows, (0, 0, zeros, 0)) for rows in (key, value))
    inverse = pseudo_inverse(similarity(landmark_query, landmark_key), iterations)
    mixed = inverse @ F.scaled_dot_product_attention(landmark_query, key, value)
    return Nystrom(landmark_query, landmark_key, key, inverse, mixed)


def similarity(
    query: Float[Tensor, "batch head query width"], key: Float[Tensor, "batch head key width"]
) -> Float[Tensor, "batch head query key"]:
    """Softmax over the keys of scaled dot products."""
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)


def pseudo_inverse(
    matrix: Float[Tensor, "batch head row row"], iterations: int
) -> Float[Tensor, "batch head row row"]:
    """Iterate towards the Moore-Penrose inverse, from each bag's own start (algorithm 1)."""
    rows, columns = (matrix.abs().sum(axis).amax(dim=(1, 2)) for axis in (3, 2))
    inverse = matrix.transpose(2, 3) / (rows * columns).view(-1, 1, 1, 1)
    unit = torch.eye(matrix.shape[3], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * unit - product @ (7 * unit - product)
        inverse = inverse @ (13 * unit - product @ inner) / 4
    return inverse


def _landmarks(
    rows: Float[Tensor, "batch head token width"], count: int, masked: bool
) -> Float[Tensor, "batch head landmark width"]:
    """Means of as many neighbouring tokens each; the zeros stand in front of the first."""
    tokens = rows.shape[2]
    each = -(-tokens // count)
    zeros = each * count - tokens
    sums = F.pad(rows, (0, 0, zeros, 0)).unflatten(2, (count, each)).sum(dim=3)
    if not masked:
        return sums / each
    empty = zeros // each
    real = torch.full((count, 1), each, dtype=rows.dtype, device=rows.device)
    real[empty] -= zeros % each
    return sums[:, :, empty:] / real[empty:]
