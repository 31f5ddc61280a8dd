"""DSMIL on one bag, instance by instance: Li et al. 2021, https://arxiv.org/abs/2011.08939.

Written apart from stages/heads, on float64 tensors so that gradients can be had too. `weight` is
a mapping of names to tensors.
"""

import math

import torch

from tests.definitions.clam_sb import linear, softmax


def streams(weight, bag, outputs):
    """Of each output the critical instance's score, the bag's, and the attention."""
    mean, scale = weight["standardise.mean"], weight["standardise.scale"]
    instances = [(instance - mean) / scale for instance in bag]
    queries = []
    for x in instances:
        inner = torch.clamp(linear(weight, "query.0", x), min=0)
        queries.append(torch.tanh(linear(weight, "query.2", inner)))
    scores = [linear(weight, "classify_instance", x) for x in instances]
    highest, vectors, attentions = [], [], []
    for c in range(outputs):
        critical = max(range(len(bag)), key=lambda at, c=c: scores[at][c].item())
        highest.append(scores[critical][c])
        root = math.sqrt(len(queries[0]))
        attention = softmax([(query * queries[critical]).sum() / root for query in queries])
        attentions.append(attention)
        vectors.append(sum(a * x for a, x in zip(attention, instances, strict=True)))
    # A convolution from `outputs` channels to `outputs` channels whose kernel is the whole vector.
    kernel = weight["classify.weight"].reshape(outputs, outputs, -1)
    of_bag = []
    for o in range(outputs):
        found = sum((kernel[o, c] * vectors[c]).sum() for c in range(outputs))
        of_bag.append(found + weight["classify.bias"][o])
    return highest, of_bag, attentions


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def outputs_of(classes):
    return 1 if classes == 2 else classes


def loss(weight, bag, label, classes):
    """Half of either stream's binary cross-entropy, the mean over the outputs."""
    outputs = outputs_of(classes)
    targets = [label] if classes == 2 else [int(label == c) for c in range(classes)]
    total = 0.0
    for stream in streams(weight, bag, outputs)[:2]:
        for x, target in zip(stream, targets, strict=True):
            right = sigmoid(x) if target else 1 - sigmoid(x)
            total = total - 0.5 * right.log() / outputs
    return total


def probability(weight, bag, classes):
    """Of each class, and the attention that is shown."""
    _, of_bag, attentions = streams(weight, bag, outputs_of(classes))
    if classes == 2:
        p = sigmoid(of_bag[0])
        return torch.stack([1 - p, p]), attentions[0]
    each = torch.stack([sigmoid(x) for x in of_bag])
    return each / each.sum(), attentions[int(each.argmax())]
