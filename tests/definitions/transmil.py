"""TransMIL on one bag, token by token: Shao et al. 2021, algorithms 1 and 2.

Written apart from stages/heads, on float64 tensors so that gradients can be had too. `weight` is
a mapping of names to tensors.
"""

import math

import torch

from tests.definitions import nystrom


def transmil(weight, bag, heads, attention, landmarks=0, iterations=0):
    """Logits of the classes and the attention on each instance of `bag` [instance][dim]."""
    mean, scale = weight["standardise.mean"], weight["standardise.scale"]
    hidden = [torch.relu(linear(weight, "project", (instance - mean) / scale)) for instance in bag]
    side = math.ceil(math.sqrt(len(bag)))
    owner = [at % len(bag) for at in range(side * side)]
    tokens = torch.stack([weight["class_token"][0, 0], *(hidden[at] for at in owner)])

    def layer(name, tokens):
        return attend(weight, name, tokens, heads, attention, landmarks, iterations)

    tokens, _ = layer("first", tokens)
    tokens = torch.cat([tokens[:1], surroundings(weight, tokens[1:], side)])
    tokens, weights = layer("second", tokens)
    logits = linear(weight, "classify", norm(weight, "norm", tokens[0]))
    # The class token's weights; a repeated instance gets what falls on all of its places.
    shares = [0.0] * len(bag)
    for place, at in enumerate(owner):
        shares[at] += max(float(weights[0, 1 + place].detach()), 0.0)
    return logits, [share / sum(shares) for share in shares]


def attend(weight, name, tokens, heads, attention, landmarks, iterations):
    """A layer's output, and its weights averaged over the heads."""
    normed = torch.stack([norm(weight, f"{name}.norm", token) for token in tokens])
    query = normed @ weight[f"{name}.query.weight"].T
    key, value = (normed @ weight[f"{name}.key_value.weight"].T).chunk(2, dim=1)
    width = query.shape[1] // heads
    queries, keys, values = (part.split(width, dim=1) for part in (query, key, value))
    if attention == "exact":
        every = [nystrom.softmax_rows(q, k) for q, k in zip(queries, keys, strict=True)]
        found = [(w @ v, w) for w, v in zip(every, values, strict=True)]
    else:
        masked = attention == "nystrom_masked"
        found = nystrom.attention(queries, keys, values, landmarks, iterations, masked)
    outs = []
    for head, (out, _) in enumerate(found):
        taps = weight[f"{name}.neighbours.weight"][head, 0, :, 0]
        outs.append(out + neighbours(taps, values[head]))
    added = torch.stack([linear(weight, f"{name}.out", row) for row in torch.cat(outs, dim=1)])
    return tokens + added, sum(weights for _, weights in found) / heads


def neighbours(taps, value):
    """For each token the weighted sum of the values around it."""
    half, rows = len(taps) // 2, []
    for token in range(len(value)):
        row = torch.zeros_like(value[0])
        for tap, factor in enumerate(taps):
            if 0 <= token + tap - half < len(value):
                row = row + factor * value[token + tap - half]
        rows.append(row)
    return torch.stack(rows)


def surroundings(weight, tokens, side):
    """Each token, and what three windows around its place in the square give."""
    out = []
    for y in range(side):
        for x in range(side):
            row = tokens[y * side + x]
            for conv, window in enumerate((7, 5, 3)):
                kernel = weight[f"positions.surroundings.{conv}.weight"]
                row = row + weight[f"positions.surroundings.{conv}.bias"]
                for i in range(window):
                    for j in range(window):
                        at_y, at_x = y + i - window // 2, x + j - window // 2
                        if 0 <= at_y < side and 0 <= at_x < side:
                            row = row + kernel[:, 0, i, j] * tokens[at_y * side + at_x]
            out.append(row)
    return torch.stack(out)


def linear(weight, name, x):
    return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]


def norm(weight, name, x):
    spread = torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return (x - x.mean()) / spread * weight[f"{name}.weight"] + weight[f"{name}.bias"]
