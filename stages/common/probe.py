"""Probing a pretraining run: what its embeddings of the training slides are worth so far."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from stages.common import cohort, encoders, stores
from stages.common.encoders import EncoderSpec
from stages.common.watch import WatchParams

TEMPERATURE = 0.07  # of the votes, as in DINO's evaluation
BATCH = 64


class Probe:
    """Patches of the training slides, and how well neighbours tell their slides' classes.

    Args:
        data: Folder that holds the results of the cohort and tile stages.
        spec: What the encoder expects.
        settings: How many patches and neighbours.
        seed: Of the choice of patches; every slide gives equally many, or some give one where
            there are more slides than patches.

    Raises:
        FileNotFoundError: a stage before has not run.
        ValueError: no train slide has a patch.
    """

    def __init__(self, data: Path, spec: EncoderSpec, settings: WatchParams, seed: int) -> None:
        rows = [row for row in cohort.read_rows(data / "cohort") if row.split == "train"]
        rows = [row for row in rows if (data / "tile" / row.slide_id / "patches.zarr").exists()]
        if len(rows) > settings.probe_patches:
            chosen = np.random.default_rng(seed).permutation(len(rows))[: settings.probe_patches]
            rows = [rows[at] for at in np.sort(chosen)]
        each = settings.probe_patches // max(len(rows), 1)
        self.spec, self.neighbours = spec, settings.neighbours
        places = [data / "tile" / row.slide_id / "patches.zarr" for row in rows]
        kept = [_some(store, each, seed, spec.image_px) for store in places]
        if not any(map(len, kept)):
            raise ValueError(
                "no train slide has a patch to probe the embeddings with: set "
                "pretrain.watch.probe_epochs to 0, or add slides or patches (tile)"
            )
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
        label, patient = (
            torch.from_numpy(of_slide[self.slide]).to(rows.device)
            for of_slide in (self.label, self.patient)
        )
        from sklearn.metrics import balanced_accuracy_score  # here: a second of every start

        votes = knn_votes(rows, label, patient, self.neighbours)
        slide = torch.from_numpy(self.slide).to(rows.device)
        of_slide = votes.new_zeros(len(self.label), votes.shape[1]).index_add_(0, slide, votes)
        return float(balanced_accuracy_score(self.label, of_slide.argmax(1).cpu().numpy()))


def _some(store: Path, count: int, seed: int, image_px: int) -> UInt8[np.ndarray, "patch px px 3"]:
    """Some patches of a slide, no larger than the encoder's images: thousands are held at once."""
    patches = stores.open_patches(store)
    side_px = min(patches.patch_px, image_px)
    order = np.random.default_rng(seed).permutation(len(patches))[:count]
    kept = [_shrunk(patches[int(at)], side_px) for at in np.sort(order)]
    return np.stack(kept) if kept else np.empty((0, side_px, side_px, 3), np.uint8)


def _shrunk(patch: UInt8[np.ndarray, "px px 3"], side_px: int) -> UInt8[np.ndarray, "side side 3"]:
    """As `encoders.prepare` resizes it, rounded."""
    if len(patch) == side_px:
        return patch
    image = torch.tensor(patch).permute(2, 0, 1)[None].float()
    small = F.interpolate(image, (side_px, side_px), mode="bicubic", antialias=True)
    return small[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


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
