"""TransMIL: a transformer over a slide's instances, laid out as a square (Shao et al. 2021)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from stages.heads import _nystrom, _training
from stages.heads._training import Bags, Labels

ATTENTION = ("exact", "nystrom", "nystrom_masked")
KERNELS = (7, 5, 3)  # of the position encoding, instances


@dataclass(frozen=True)
class Params:
    """Section evaluate.transmil of params.yaml."""

    width: int  # numbers of a token (512 in the authors' code)
    heads: int  # of both attentions (8)
    attention: str  # exact; nystrom: the official form; nystrom_masked: its zeros left out
    landmarks: int  # of nystrom (256)
    pinv_iterations: int  # of nystrom (6)
    residual_tokens: int  # neighbours whose values each token adds to its attention, odd (33)
    dropout: float  # behind both attentions, share (0.1)
    training: _training.Training

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        if self.attention not in ATTENTION:
            raise ValueError(
                f"evaluate.transmil.attention is {self.attention!r}: it must be one of "
                f"{', '.join(ATTENTION)}"
            )
        for name in ("width", "heads", "landmarks", "pinv_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"evaluate.transmil.{name} is {getattr(self, name)}: it must be 1 or more"
                )
        if self.width % self.heads:
            raise ValueError(
                f"evaluate.transmil.width is {self.width}: it must be a multiple of heads, "
                f"{self.heads}"
            )
        if self.residual_tokens < 1 or self.residual_tokens % 2 == 0:
            raise ValueError(
                f"evaluate.transmil.residual_tokens is {self.residual_tokens}: it must be odd, a "
                "token and as many neighbours on both sides"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"evaluate.transmil.dropout is {self.dropout}: it must be 0 or more and below 1"
            )


class Layer(nn.Module):
    """Layer norm, attention among tokens, and the tokens added; no MLP."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        width, heads, taps = params.width, params.heads, params.residual_tokens
        self.params = params
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.neighbours = nn.Conv2d(
            heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False
        )
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(params.dropout)

    def forward(
        self, tokens: Float[Tensor, "batch token width"]
    ) -> Float[Tensor, "batch token width"]:
        """Every token with what it attends to added."""
        query, key, value = self._project(tokens, tokens.shape[1])
        if self.params.attention == "exact":
            found = F.scaled_dot_product_attention(query, key, value)
        else:
            found = self._nystrom(query, key, value).attend(query)
        return self._add(tokens, found + self.neighbours(value))

    def read(
        self, tokens: Float[Tensor, "batch token width"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch token"]]:
        """The first token as `forward` has it, and its attention, the mean over the heads."""
        exact = self.params.attention == "exact"
        query, key, value = self._project(tokens, 1 if exact else tokens.shape[1])
        first = query[:, :, :1]
        if exact:
            weights = _nystrom.similarity(first, key)
            found = weights @ value
        else:
            landmarks = self._nystrom(query, key, value)
            found = landmarks.attend(first)
            with torch.no_grad():
                weights = landmarks.weights(first, tokens.shape[1])
        near = value[:, :, : self.params.residual_tokens]
        found = found + self.neighbours(near)[:, :, :1]
        return self._add(tokens[:, :1], found)[:, 0], weights.detach().mean(dim=1)[:, 0]

    def _project(self, tokens: Tensor, queries: int) -> list[Tensor]:
        """The first `queries`, all keys and values; [batch, head, token, width / heads] each."""
        normed = self.norm(tokens)
        parts = [self.query(normed[:, :queries]), *self.key_value(normed).chunk(2, dim=2)]
        return [part.unflatten(2, (self.params.heads, -1)).transpose(1, 2) for part in parts]

    def _nystrom(self, query: Tensor, key: Tensor, value: Tensor) -> _nystrom.Nystrom:
        params = self.params
        masked = params.attention == "nystrom_masked"
        return _nystrom.approximate(
            query, key, value, params.landmarks, params.pinv_iterations, masked
        )

    def _add(self, tokens: Tensor, found: Tensor) -> Tensor:
        return tokens + self.dropout(self.out(found.transpose(1, 2).flatten(2)))


class PositionEncoding(nn.Module):
    """PPEG: each instance of the square adds three convolutions of its surroundings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.surroundings = nn.ModuleList(
            nn.Conv2d(width, width, side, padding=side // 2, groups=width) for side in KERNELS
        )

    def forward(
        self, square: Float[Tensor, "batch instance width"]
    ) -> Float[Tensor, "batch instance width"]:
        """Instances row by row; the class token is not among them.

        The three kernels and the identity are summed first: one convolution in place of three.
        """
        side, widest = math.isqrt(square.shape[1]), KERNELS[0]
        weight = sum(
            F.pad(conv.weight, [(widest - conv.kernel_size[0]) // 2] * 4)
            for conv in self.surroundings
        )
        bias = sum(conv.bias for conv in self.surroundings)
        image = square.transpose(1, 2).unflatten(2, (side, side))
        image = image + F.conv2d(image, weight, bias, padding=widest // 2, groups=len(bias))
        return image.flatten(2).transpose(1, 2)


class TransMIL(nn.Module):
    """Projection, class token, attention, position encoding, attention, linear classifier.

    Source:
        Shao et al. 2021, https://arxiv.org/abs/2106.00908, algorithms 1 and 2, sizes as in the
        authors' code. Differs from it in the default: softmax attention itself, which is exact
        and faster for bags of some hundred instances, in place of its approximation. Either way
        the second layer is worked out for the class token alone, the only one that is read.
        Instances are standardised by the train instances where `training` says so.

    The order of the instances matters: they fill a square row by row, and the first are repeated
    to complete it. Bags of a batch are grouped by the side of their squares, so that nothing is
    padded and no bag changes another's result. The attention returned is that of the class token
    in the second layer, the mean over heads, without the class token's own share; what falls on
    a repetition is added to its instance. Negative weights, which the approximation may give,
    count as 0.
    """

    def __init__(self, dim: int, classes: int, params: Params) -> None:
        super().__init__()
        self.params, self.classes = params, classes
        self.standardise = _training.Standardise(dim)
        self.project = nn.Linear(dim, params.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, params.width))
        self.first, self.second = Layer(params), Layer(params)
        self.positions = PositionEncoding(params.width)
        self.norm = nn.LayerNorm(params.width)
        self.classify = nn.Linear(params.width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token; every other part draws its own."""
        nn.init.normal_(self.class_token)

    def forward(
        self,
        bag: Float[Tensor, "batch instance dim"],
        mask: Bool[Tensor, "batch instance"],
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        """Class logits and attention; where `mask` is False an instance is padding."""
        hidden = torch.relu(self.project(self.standardise(bag[mask])))  # [real instance, width]
        logits = hidden.new_zeros(len(bag), self.classes)
        attention = hidden.new_zeros(len(hidden))
        for rows, index in squares(mask.sum(dim=1)):
            found, weights = self._read(hidden[index])
            logits = logits.index_copy(0, rows, found)
            attention.index_add_(0, index.flatten(), weights.flatten())
        return logits, attention.new_zeros(mask.shape).masked_scatter(mask, attention)

    def _read(
        self, square: Float[Tensor, "batch instance width"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch instance"]]:
        tokens = torch.cat([self.class_token.expand(len(square), -1, -1), square], dim=1)
        tokens = self.first(tokens)
        tokens = torch.cat([tokens[:, :1], self.positions(tokens[:, 1:])], dim=1)
        read, weights = self.second.read(tokens)
        weights = weights[:, 1:].clamp_min(0) + torch.finfo(weights.dtype).tiny
        return self.classify(self.norm(read)), weights / weights.sum(dim=1, keepdim=True)

    def fit(
        self, bags_train: Bags, labels_train: Labels, bags_val: Bags, labels_val: Labels, seed: int
    ) -> None:
        """Train from new weights; see `stages.heads.Head`."""
        train, val = (bags_train, labels_train), (bags_val, labels_val)
        _training.fit(self, train, val, seed, self.params.training)

    def predict(
        self, bags: Bags
    ) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
        """Probabilities and attention; see `stages.heads.Head`."""
        return _training.predict(self, bags, self.params.training.batch)


def squares(
    lengths: Int64[Tensor, " batch"],
) -> list[tuple[Int64[Tensor, " rows"], Int64[Tensor, "rows instance"]]]:
    """Bags whose instances fill squares of one side, and the instances that fill them.

    Args:
        lengths: Instances of each bag; the bags stand one behind the other in one table.

    Returns:
        For each side the bags, and for each of them side * side rows of that table: its own, then
        its first again.
    """
    sides = [math.isqrt(length - 1) + 1 for length in lengths.tolist()]
    starts = lengths.cumsum(0) - lengths
    groups = []
    for side in sorted(set(sides)):
        chosen = [row for row, found in enumerate(sides) if found == side]
        rows = torch.tensor(chosen, device=lengths.device)
        places = torch.arange(side * side, device=lengths.device) % lengths[rows, None]
        groups.append((rows, starts[rows, None] + places))
    return groups


def build(dim: int, classes: int, params: Params) -> TransMIL:
    """An untrained TransMIL for instances of `dim` numbers."""
    return TransMIL(dim, classes, params)
