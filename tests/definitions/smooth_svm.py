"""Smooth top-k SVM loss of one row, over all sets of k classes: Berrada et al. 2018, section 3."""

import itertools

import torch


def topk(scores, label, k, alpha=1.0, tau=1.0):
    """tau log sum over sets of exp((margin + mean score) / tau), minus that over right sets."""
    every, right = [], []
    for chosen in itertools.combinations(range(len(scores)), k):
        mean = sum(scores[c] for c in chosen) / k
        if label in chosen:
            right.append(torch.exp(mean / tau))
            every.append(torch.exp(mean / tau))
        else:
            every.append(torch.exp((alpha + mean) / tau))
    return tau * sum(every).log() - tau * sum(right).log()


def top1(scores, label, alpha=1.0, tau=1.0):
    return topk(scores, label, 1, alpha, tau)
