"""DTFD-MIL on one bag, group by group: Zhang et al. 2022, https://arxiv.org/abs/2203.12081.

Written apart from stages/heads, on float64 tensors so that gradients can be had too. `weight` is
a mapping of names to tensors; `groups` is a list of lists of instance numbers.
"""

import torch

from tests.definitions.clam_sb import cross_entropy, linear, pooled, scores_of, softmax


def first_tier(weight, bag, groups, distillation):
    """Of each group the logits, and the features it distils, each with its instances' weights."""
    mean, scale = weight["standardise.mean"], weight["standardise.scale"]
    logits, features = [], []
    for group in groups:
        hidden = [
            torch.clamp(weight["first.project.weight"] @ ((bag[at] - mean) / scale), min=0)
            for at in group
        ]
        attention = softmax(scores_of(weight, "first.attend", hidden))
        of_group = pooled(attention, hidden)
        logits.append(linear(weight, "first.classify", of_group))
        ranks = len(logits[-1]) - 1 if len(logits[-1]) == 2 else int(logits[-1].argmax())
        if distillation == "AFS":
            features.append((of_group, dict(zip(group, attention, strict=True))))
            continue
        for place in chosen(weight, hidden, attention, ranks, distillation):
            features.append((hidden[place], {group[place]: torch.ones(())}))
    return logits, features


def chosen(weight, hidden, attention, ranks, distillation):
    """Places in the group, by attention or by the instance's probability of class `ranks`."""
    places = range(len(hidden))
    if distillation == "MAS":
        return [max(places, key=lambda at: attention[at].item())]
    probability = []
    for a, h in zip(attention, hidden, strict=True):
        activation = weight["first.classify.weight"] @ (a * h)
        probability.append((activation.exp() / activation.exp().sum())[ranks].item())
    best = max(places, key=lambda at: probability[at])
    worst = min(places, key=lambda at: probability[at])
    return [best] if distillation == "MaxS" else [best, worst]


def second_tier(weight, features):
    """Logits of the bag and the attention on the features, which carry no gradient."""
    features = [feature.detach() for feature, _ in features]
    attention = softmax(scores_of(weight, "second.attend", features))
    return linear(weight, "second.classify", pooled(attention, features)), attention


def losses(weight, bag, label, groups, distillation):
    """The first tier's loss, the mean over the groups, and the second tier's."""
    logits, features = first_tier(weight, bag, groups, distillation)
    first = sum(cross_entropy(of_group, label) for of_group in logits) / len(logits)
    return first, cross_entropy(second_tier(weight, features)[0], label)


def probability(weight, bag, splits, distillation):
    """Mean over the splits, and each instance's weight in the bag's last vector, as well."""
    found, weights = [], [0.0] * len(bag)
    for groups in splits:
        _, features = first_tier(weight, bag, groups, distillation)
        logits, attention = second_tier(weight, features)
        found.append(logits.exp() / logits.exp().sum())
        for a, (_, shares) in zip(attention, features, strict=True):
            for at, share in shares.items():
                weights[at] += (a * share).item() / len(splits)
    return sum(found) / len(found), weights
