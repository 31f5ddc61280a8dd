"""One fit of a head on one split with one seed: what it may know, and what it leaves behind."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64

from stages.common import calibration, plugins, thresholds
from stages.common.bags import Bag, StoredBags
from stages.common.perslide import Job

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Fit:
    """All that a fit is given: test slides are names to predict, their labels have no field."""

    name: str
    repeat: int
    fold: int
    seed: int
    head: str  # a file of stages/heads
    params: Any  # its Params
    classes: int
    bags: Path
    slide_ids: dict[str, list[str]]  # of train, val and test
    labels: dict[str, list[int]]  # of train and val
    random_features: bool = False  # numbers drawn in place of embeddings
    optimistic: bool = False  # validation slides are the test slides: the best on them is taken

    def job(self, digests: dict[str, str]) -> Job:
        """For `perslide.run`; `digests` are those of the slides' bags."""
        inputs = [f"seed {self.seed}", f"random features {self.random_features}"]
        inputs += ["optimistic"] * self.optimistic
        for part in PARTS:
            slides = self.slide_ids[part]
            labels = self.labels.get(part, [""] * len(slides))
            inputs += [
                f"{part} {slide_id} {label} {digests[slide_id]}"
                for slide_id, label in zip(slides, labels, strict=True)
            ]
        return Job(self.name, tuple(inputs), {"fit": self})


class Noise(Sequence[Bag]):
    """Bags of the same shapes that say nothing of their slides."""

    def __init__(self, bags: StoredBags, seed: int) -> None:
        self.bags, self.seed = bags, seed

    def __len__(self) -> int:
        """How many slides."""
        return len(self.bags)

    def __getitem__(self, at: int) -> Bag:
        """Normal numbers, for a slide the same each time."""
        shape = self.bags[at].shape
        rng = np.random.default_rng([self.seed, *self.bags.slide_ids[at].encode()])
        return rng.standard_normal(shape, dtype=np.float32)


def make(folder: Path, job: Job) -> None:
    """Fit and predict; write predictions.parquet, and attention.parquet of the test slides.

    Epoch and strength are chosen by the head, threshold and temperature here, all of them on the
    validation slides.
    """
    torch.set_num_threads(1)  # heads are small: threads cost more than they save, and reorder sums
    fit: Fit = job.arguments["fit"]
    parts = {part: _bags(fit, part) for part in PARTS}
    head = _fitted(fit, parts)
    predicted = {part: head.predict(parts[part]) for part in PARTS}
    chosen = _chosen(np.array(fit.labels["val"]), predicted["val"][0], fit.optimistic)
    tables = [_table(fit, part, predicted[part][0], chosen) for part in PARTS]
    pd.concat(tables).to_parquet(folder / "predictions.parquet", index=False)
    attention = _attention(fit.slide_ids["test"], predicted["test"][1])
    attention.to_parquet(folder / "attention.parquet", index=False)


def _bags(fit: Fit, part: str) -> Sequence[Bag]:
    scales = getattr(plugins.load("heads", fit.head), "SCALES", 1)
    stored = StoredBags(fit.bags, fit.slide_ids[part], scales)
    return Noise(stored, fit.seed) if fit.random_features else stored


def _fitted(fit: Fit, parts: dict[str, Sequence[Bag]]) -> Any:
    """A `stages.heads.Head`."""
    dim = parts["train"][0].shape[1]
    params = _by_accuracy(fit.params) if fit.optimistic else fit.params
    head = plugins.load("heads", fit.head).build(dim, fit.classes, params)
    train, val = ((parts[part], np.array(fit.labels[part])) for part in PARTS[:2])
    head.fit(*train, *val, fit.seed)
    return head


def _by_accuracy(params: Any) -> Any:
    """A head's params, with the epoch chosen by accuracy; meanpool has no epochs."""
    if not hasattr(params, "training"):
        return params
    training = dataclasses.replace(params.training, select="accuracy")
    return dataclasses.replace(params, training=training)


def _chosen(
    labels: np.ndarray, probability: Float64[np.ndarray, "slide classes"], optimistic: bool
) -> dict[str, float]:
    """The columns threshold (two classes) and temperature."""
    tiny = np.finfo(np.float64).tiny
    temperature = calibration.temperature(np.log(np.maximum(probability, tiny)), labels)
    if probability.shape[1] > 2:
        return {"temperature": temperature}
    best = thresholds.accurate if optimistic else thresholds.balanced
    threshold = best(labels, probability[:, 1])
    return {"threshold": threshold, "temperature": temperature}


def _table(
    fit: Fit,
    part: str,
    probability: Float64[np.ndarray, "slide classes"],
    chosen: dict[str, float],
) -> pd.DataFrame:
    """One row a slide."""
    columns = {"slide_id": fit.slide_ids[part], "repeat": fit.repeat, "fold": fit.fold}
    columns |= {"split": part, "seed": fit.seed}
    columns |= {f"probability_{at}": probability[:, at] for at in range(fit.classes)}
    return pd.DataFrame(columns | chosen)


def _attention(
    slide_ids: list[str], attention: list[Float64[np.ndarray, " instance"]]
) -> pd.DataFrame:
    """One row a patch; sums to 1 for a slide."""
    lengths = [len(of_slide) for of_slide in attention]
    columns = {
        "slide_id": np.repeat(np.array(slide_ids, dtype=object), lengths),
        "patch": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        "attention": np.concatenate(attention).astype(np.float32),
    }
    return pd.DataFrame(columns)
