"""LESS's aggregator on one bag: CrossViT as Chen et al. 2021 print it, attention row by row.

Written apart from stages/heads, on float64 tensors so that gradients can be had too. `weight` is
a mapping of names to tensors.
"""

import math

import torch
import torch.nn.functional as F

CROP, PATCH = 0, 1


def less(weight, bag, heads, depths, stages, patch_width, project=True):
    """Logits of the classes and the attention on each instance of `bag` [instance][dim]."""
    bag = (bag - weight["standardise.mean"]) / weight["standardise.scale"]
    scales = [[row[patch_width:] for row in bag], [row[:patch_width] for row in bag]]
    for scale in (CROP, PATCH):
        if project:
            scales[scale] = [linear(weight, f"project.{scale}", row) for row in scales[scale]]
        scales[scale].insert(0, weight[f"class_tokens.{scale}"][0, 0])
    for stage in range(stages):
        for scale in (CROP, PATCH):
            for depth in range(depths[scale]):
                name = f"stages.{stage}.blocks.{scale}.{depth}"
                scales[scale] = block(weight, name, scales[scale], heads)
        read = [
            reading(weight, f"stages.{stage}.readings.{own}", scales[own][0], other, heads)
            for own, other in ((CROP, scales[PATCH][1:]), (PATCH, scales[CROP][1:]))
        ]
        for scale in (CROP, PATCH):
            scales[scale] = [read[scale][0], *scales[scale][1:]]
    logits = [
        linear(weight, f"classify.{scale}", norm(weight, f"norms.{scale}", scales[scale][0]))
        for scale in (CROP, PATCH)
    ]
    shares = [float(a.detach() + b.detach()) for a, b in zip(read[0][1], read[1][1], strict=True)]
    return (logits[CROP] + logits[PATCH]) / 2, [share / sum(shares) for share in shares]


def block(weight, name, tokens, heads):
    """Self-attention of every token, then its MLP."""
    normed = [norm(weight, f"{name}.norm_attention", token) for token in tokens]
    parts = [linear(weight, f"{name}.query_key_value", row).chunk(3) for row in normed]
    out = []
    for at, token in enumerate(tokens):
        keys, values = [part[1] for part in parts], [part[2] for part in parts]
        found, _ = attend(parts[at][0], keys, values, heads)
        token = token + linear(weight, f"{name}.out", found)
        hidden = F.gelu(linear(weight, f"{name}.mlp.0", norm(weight, f"{name}.norm_mlp", token)))
        out.append(token + linear(weight, f"{name}.mlp.2", hidden))
    return out


def reading(weight, name, class_token, instances, heads):
    """The class token through the other scale and back; its attention to the instances."""
    asking = translation(weight, f"{name}.there", class_token)
    tokens = [norm(weight, f"{name}.norm", token) for token in (asking, *instances)]
    parts = [linear(weight, f"{name}.key_value", token).chunk(2) for token in tokens]
    query = linear(weight, f"{name}.query", tokens[0])
    found, weights = attend(query, [key for key, _ in parts], [value for _, value in parts], heads)
    back = translation(weight, f"{name}.back", asking + linear(weight, f"{name}.out", found))
    return back, weights[1:]


def attend(query, keys, values, heads):
    """What one query gets from all tokens, and its weights averaged over the heads."""
    width, found, every = len(query) // heads, [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = [torch.dot(query[own], key[own]) / math.sqrt(width) for key in keys]
        power = [torch.exp(score) for score in scores]
        weights = [one / sum(power) for one in power]
        found.append(sum(one * value[own] for one, value in zip(weights, values, strict=True)))
        every.append(torch.stack(weights))
    return torch.cat(found), sum(every) / heads


def translation(weight, name, x):
    """Layer norm, GELU, linear."""
    return linear(weight, f"{name}.2", F.gelu(norm(weight, f"{name}.0", x)))


def linear(weight, name, x):
    return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]


def norm(weight, name, x):
    spread = torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)
    return (x - x.mean()) / spread * weight[f"{name}.weight"] + weight[f"{name}.bias"]
