"""Fits where there is nothing to learn: what a head scores there is chance, or a leak."""

import dataclasses

import numpy as np

from stages.common.fits import Fit
from stages.common.splits import OPTIMISTIC

PERMUTED, RANDOM = "sanity_permuted_labels_auc", "sanity_random_features_auc"


def fits_of(plan: list[Fit], seeds: int, protocol: str) -> dict[str, list[Fit]]:
    """The first split's fits again, where there is nothing to learn: an AUC of 0.5 is expected.

    Labels are permuted among the train slides, and among the validation slides unless those are
    the test slides, whose true labels are what makes the optimistic protocol optimistic. Each fit
    has a permutation of its own, in which slides of every class get each label equally often:
    others agree with the truth by chance, and a head that learns well then scores far from 0.5.
    """
    firsts = plan[:seeds]
    parts = ("train",) if protocol == OPTIMISTIC else ("train", "val")
    return {
        PERMUTED: [
            dataclasses.replace(
                fit, name=f"permuted-seed{fit.seed}", labels=fit.labels | _permuted(fit, parts)
            )
            for fit in firsts
        ],
        RANDOM: [
            dataclasses.replace(fit, name=f"random-seed{fit.seed}", random_features=True)
            for fit in firsts
        ],
    }


def _permuted(fit: Fit, parts: tuple[str, ...]) -> dict[str, list[int]]:
    rng = np.random.default_rng([fit.seed, *f"{fit.bags.name} {fit.head}".encode()])
    return {part: permuted(np.array(fit.labels[part]), rng).tolist() for part in parts}


def permuted(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels [slide] in another order, each class getting every label in its share of all.

    What does not divide is drawn; a class lost that way brings a plain permutation.
    """
    share = np.bincount(labels) / len(labels)
    found = labels.copy()
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        wanted = share * len(own)
        counts = np.floor(wanted + 1e-9).astype(np.int64)
        rest = np.clip(wanted - counts, 1e-12, None)
        drawn = rng.choice(len(share), len(own) - counts.sum(), replace=True, p=rest / rest.sum())
        found[own] = [*np.repeat(np.arange(len(share)), counts), *drawn]
    lost = set(labels.tolist()) - set(found.tolist())
    return rng.permutation(labels) if lost else found
