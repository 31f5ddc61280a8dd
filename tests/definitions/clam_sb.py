"""CLAM-SB on one bag, instance by instance: Lu et al. 2021, https://arxiv.org/abs/2004.09666.

Written apart from stages/heads, on float64 tensors so that gradients can be had too. `weight` is
a mapping of names to tensors. No dropout.
"""

import torch

from tests.definitions.smooth_svm import top1


def linear(weight, name, x):
    return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]


def scores_of(weight, name, hidden):
    """Gated attention before the softmax, one instance at a time."""
    scores = []
    for h in hidden:
        branch = torch.tanh(linear(weight, f"{name}.tanh", h))
        gate = 1 / (1 + torch.exp(-linear(weight, f"{name}.gate", h)))
        scores.append(linear(weight, f"{name}.out", branch * gate)[0])
    return scores


def softmax(scores):
    total = sum(score.exp() for score in scores)
    return [score.exp() / total for score in scores]


def cross_entropy(logits, label):
    return -(logits[label].exp() / logits.exp().sum()).log()


def pooled(attention, hidden):
    return sum(a * h for a, h in zip(attention, hidden, strict=True))


def read(weight, bag):
    """Logits, attention and projected instances of `bag` [instance][dim]."""
    mean, scale = weight["standardise.mean"], weight["standardise.scale"]
    hidden = [
        torch.clamp(linear(weight, "project", (instance - mean) / scale), min=0) for instance in bag
    ]
    attention = softmax(scores_of(weight, "attend", hidden))
    return linear(weight, "classify", pooled(attention, hidden)), attention, hidden


def instance_loss(weight, attention, hidden, label, classes, k, kind, subtyping):
    """Instances ranked by attention; `kind` is svm or ce."""
    order = sorted(range(len(hidden)), key=lambda at: attention[at].item(), reverse=True)
    half = min(k, len(hidden) // 2)
    total = torch.zeros((), dtype=hidden[0].dtype)
    for c in range(classes):
        rows = weight["classify_instance.weight"][2 * c : 2 * c + 2]
        bias = weight["classify_instance.bias"][2 * c : 2 * c + 2]
        if c == label:
            targets = [(at, 1) for at in order[:half]]
            targets += [(at, 0) for at in order[::-1][:half]]
        else:
            targets = [(at, 0) for at in order[:k]] if subtyping else []
        losses = []
        for at, target in targets:
            logits = rows @ hidden[at] + bias
            losses.append(top1(logits, target) if kind == "svm" else cross_entropy(logits, target))
        if losses:
            total = total + sum(losses) / len(losses)
    return total / classes if subtyping else total


def loss(weight, bag, label, classes, k, kind, subtyping, bag_weight):
    """The bag's weighted loss."""
    logits, attention, hidden = read(weight, bag)
    of_instances = instance_loss(weight, attention, hidden, label, classes, k, kind, subtyping)
    return bag_weight * cross_entropy(logits, label) + (1 - bag_weight) * of_instances
