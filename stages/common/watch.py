"""Watching a pretraining run: what its embeddings are worth so far, and whether it collapsed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from stages.common import cohort, encoders, stores
from stages.common.encoders import EncoderSpec

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07  # of the votes, as in DINO's evaluation
BATCH = 64
ONE_WAY = 0.01  # embedding_std below which all patches look alike
UNIFORM = 0.99999  # teacher_entropy above which the outputs say nothing
ONE_PROTOTYPE = 0.01  # prototypes_entropy below which all patches fall on one


@dataclass(frozen=True)
class WatchParams:
    """Section pretrain.watch of params.yaml; nothing in it changes the weights."""

    probe_epochs: int  # epochs between two probes of the embeddings; 0: none
    probe_patches: int  # most patches that a probe embeds
    neighbours: int  # that vote on a patch (DINO 20)
    collapse_after: float  # share of the run from which a collapse stops it; 1: it never does
    collapse_rows: int  # rows of the curves in a row that must show it

    def __post_init__(self) -> None:
        """Refuse values with which nothing could be seen."""
        for name in ("probe_patches", "neighbours", "collapse_rows"):
            if getattr(self, name) < 1:
                found = getattr(self, name)
                raise ValueError(
                    f"params.yaml: pretrain.watch.{name} is {found}: it must be 1 or more"
                )
        if self.probe_epochs < 0 or not 0 <= self.collapse_after <= 1:
            raise ValueError(
                f"params.yaml: pretrain.watch.probe_epochs is {self.probe_epochs}, collapse_after "
                f"{self.collapse_after}: they must be 0 or more, and from 0 to 1"
            )

    def due(self, step: int, every: int, per_epoch: int) -> bool:
        """Whether a probe is due at step `step`, rows being `every` steps apart."""
        if not self.probe_epochs:
            return False
        stride = per_epoch * self.probe_epochs
        return step // stride > max(step - every, 0) // stride


class Probe:
    """Patches of the training slides, and how well neighbours tell their slides' classes.

    Args:
        data: Folder that holds the results of the cohort and tile stages.
        spec: What the encoder expects.
        settings: How many patches and neighbours.
        seed: Of the choice of patches; every slide gives equally many.

    Raises:
        FileNotFoundError: a stage before has not run.
    """

    def __init__(self, data: Path, spec: EncoderSpec, settings: WatchParams, seed: int) -> None:
        rows = [row for row in cohort.read_rows(data / "cohort") if row.split == "train"]
        rows = [row for row in rows if (data / "tile" / row.slide_id / "patches.zarr").exists()]
        each = max(1, settings.probe_patches // max(len(rows), 1))
        self.spec, self.neighbours = spec, settings.neighbours
        kept = [_some(data / "tile" / row.slide_id / "patches.zarr", each, seed) for row in rows]
        self.patches: UInt8[np.ndarray, "patch px px 3"] = np.concatenate(kept)
        slide = np.repeat(np.arange(len(rows)), [len(some) for some in kept])
        labels, patients = [row.label for row in rows], [row.patient for row in rows]
        self.slide: Int64[np.ndarray, " patch"] = slide
        self.label = np.unique(labels, return_inverse=True)[1]
        self.patient = np.unique(patients, return_inverse=True)[1]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """RankMe of the embeddings, and slides told right by patches of other patients.

        `knn_balanced_accuracy` is left out where there is one class or one patient to learn from.
        """
        rows = self._embed(encoder)
        found = {"rankme": rankme(rows)}
        if len(set(self.label)) > 1 and len(set(self.patient)) > 1:
            found["knn_balanced_accuracy"] = self._told(rows)
        return found

    def _embed(self, encoder: nn.Module) -> Float[Tensor, "patch dim"]:
        device = next(encoder.parameters()).device
        parts = torch.from_numpy(self.patches).split(BATCH)
        with torch.no_grad(), evaluating(encoder):
            rows = [encoder(encoders.prepare(part.to(device), self.spec)) for part in parts]
        return torch.cat(rows).float()

    def _told(self, rows: Float[Tensor, "patch dim"]) -> float:
        from sklearn.metrics import balanced_accuracy_score  # here: a second of every start

        label, patient = (
            torch.from_numpy(of_slide[self.slide]).to(rows.device)
            for of_slide in (self.label, self.patient)
        )
        votes = knn_votes(rows, label, patient, self.neighbours)
        slide = torch.from_numpy(self.slide).to(rows.device)
        of_slide = votes.new_zeros(len(self.label), votes.shape[1]).index_add_(0, slide, votes)
        return float(balanced_accuracy_score(self.label, of_slide.argmax(1).cpu().numpy()))


def _some(store: Path, count: int, seed: int) -> UInt8[np.ndarray, "patch px px 3"]:
    patches = stores.open_patches(store)
    order = np.random.default_rng(seed).permutation(len(patches))
    return np.stack([patches[int(at)] for at in np.sort(order[:count])])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in evaluation mode; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def knn_votes(
    rows: Float[Tensor, "row dim"],
    label: Int64[Tensor, " row"],
    patient: Int64[Tensor, " row"],
    neighbours: int,
) -> Float[Tensor, "row class"]:
    """What the nearest rows of other patients say of each row's class; rows add up to 1.

    Source:
        Wu et al. 2018, https://arxiv.org/abs/1805.01978, as in DINO's eval_knn.py: cosines weigh
        exp(cosine / 0.07). Ours: rows of the same patient do not vote, so that stain and slide,
        which they share, help nobody; and a class counts by its votes over its share of those who
        may vote, or a patient's own class, the rarer without him, would lose every tie.
    """
    unit = F.normalize(rows.float(), dim=1)
    cosine = (unit @ unit.T).masked_fill(patient[:, None] == patient, -torch.inf)
    nearest = cosine.topk(min(neighbours, len(rows)), dim=1)
    weight = ((nearest.values - 1) / TEMPERATURE).exp()  # 0 where a patient's own row was taken
    votes = weight.new_zeros(len(rows), int(label.max()) + 1)
    votes.scatter_add_(1, label[nearest.indices], weight)
    others = (patient[:, None] != patient).to(votes.dtype)
    votes /= (others @ F.one_hot(label, votes.shape[1]).to(votes.dtype)).clamp_min(1)
    return votes / votes.sum(1, keepdim=True).clamp_min(1e-30)


def rankme(rows: Float[Tensor, "row dim"]) -> float:
    """How many dimensions the embeddings fill: the exponential of the entropy of singular values.

    Source:
        Garrido et al. 2023, equations 3 and 4, https://arxiv.org/abs/2210.02885.
    """
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum().clamp_min(1e-300) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def raise_alarm(rows: list[dict[str, float]], progress: float, settings: WatchParams) -> None:
    """Stop a run whose last rows all show the same kind of collapse.

    Raises:
        ValueError: they do; it says what was seen, what is healthy, and what to change.
    """
    last = rows[-settings.collapse_rows :]
    if progress < settings.collapse_after or len(last) < settings.collapse_rows:
        return
    for name, bad, what in _SIGNS:
        if all(name in row and bad(row[name]) for row in last):
            raise ValueError(
                f"pretraining collapsed: {name} is {last[-1][name]:.4g} at step "
                f"{last[-1]['step']:.0f} and in the {len(last)} rows up to it: {what}. Checkpoints "
                "and curves are kept; pretrain.watch.collapse_after 1 would let it go on"
            )


_SIGNS = (
    (
        "embedding_std",
        lambda value: value < ONE_WAY,
        "every patch has the same embedding (healthy: 0.2 to 1). Lower pretrain.learning_rate, "
        "raise pretrain.batch, or raise the method's momentum",
    ),
    (
        "teacher_entropy",
        lambda value: value > UNIFORM,
        "the teacher's outputs are uniform, the loss stays at ln(prototypes). Lower "
        "pretrain.dino.teacher_temperature, or pretrain.dino.prototypes",
    ),
    (
        "prototypes_entropy",
        lambda value: value < ONE_PROTOTYPE,
        "all patches fall on one prototype (healthy: 0.3 to 1). Raise "
        "pretrain.dino.teacher_temperature, or lower pretrain.dino.center_momentum",
    ),
)
