"""Probing a run: the neighbours' vote, RankMe, and the probe on real stores."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from stages.common import cohort, encoders, stores
from stages.common.cohort import SlideRow
from stages.common.probe import Probe, evaluating, knn_votes, rankme
from stages.common.watch import WatchParams

SETTINGS = WatchParams(
    probe_epochs=2, probe_patches=24, neighbours=3, collapse_after=0.5, collapse_rows=3
)
SPEC = encoders.EncoderSpec("any", 16, 8, 0, "none", (0.0,) * 3, (1.0,) * 3, 16, 0.5)


class Colour(nn.Module):
    """Embeds a patch as its mean colour, with a batch norm that must not be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=True)

    def forward(self, images):
        return self.norm(images.mean((2, 3)))


def write_cohort(data, slides) -> None:
    """slides: (label, patient, split, colour); five patches each of about that colour."""
    rows = []
    for at, (label, patient, split, colour) in enumerate(slides):
        name = f"s{at:02}"
        rows.append(SlideRow(name, "x", label, patient, split, "0.5", ""))
        noise = np.random.default_rng(at).integers(-9, 9, (5, 16, 16, 3))
        patches = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        attributes = {"slide_id": name, "mpp": 0.5, "slide_mpp": 0.5, "input": ""}
        path = data / "tile" / name / "patches.zarr"
        path.parent.mkdir(parents=True)
        stores.create_patches(path, patches, np.zeros((5, 2), np.int64), 16, attributes, "zstd")
    (data / "cohort").mkdir()
    cohort.write_rows(data / "cohort", rows, ["a", "b"])


RED, BLUE = (200, 60, 60), (60, 60, 200)


def test_neighbours_of_other_patients_vote_by_their_cosine():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 4, generator=generator, dtype=torch.float64).float()
    label = torch.arange(11) % 3
    patient = torch.arange(11) // 2
    got = knn_votes(rows, label, patient, 4)
    for at in range(11):
        cosine = {
            other: torch.cosine_similarity(rows[at], rows[other], 0).item()
            for other in range(11)
            if patient[other] != patient[at]
        }
        nearest = sorted(cosine, key=cosine.get)[-4:]
        votes = np.zeros(3)
        for other in nearest:
            allowed = [one for one in cosine if label[one] == label[other]]
            votes[label[other]] += math.exp(cosine[other] / 0.07) / len(allowed)
        np.testing.assert_allclose(got[at].numpy(), votes / votes.sum(), rtol=1e-4)


def test_embeddings_that_say_nothing_are_right_by_chance():
    """Without weights by class the own class, rarer among the others, would nearly always lose."""
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    label = (torch.arange(400) // 20) % 2
    votes = knn_votes(rows, label, torch.arange(400) // 20, 20)
    patients = votes.view(20, 20, 2).sum(1).argmax(1)
    right = (patients == torch.arange(20) % 2).double().mean().item()
    assert 0.25 <= right <= 0.75


def test_own_patient_never_votes():
    rows = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    votes = knn_votes(rows, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), 9)
    assert votes.argmax(1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_equal_dimensions(rank):
    rows = torch.zeros(20, 8)
    rows[:rank] = torch.eye(8)[:rank] * 5
    assert rankme(rows) == pytest.approx(rank, rel=1e-4)


def test_rankme_of_nothing_but_zeros_is_finite():
    assert math.isfinite(rankme(torch.zeros(5, 3)))


def test_probe_tells_slides_by_patches_of_other_patients(tmp_path):
    write_cohort(
        tmp_path,
        [("a", "p1", "train", RED), ("a", "p2", "train", RED), ("b", "p3", "train", BLUE)]
        + [("b", "p4", "train", BLUE), ("b", "p5", "test", RED), ("a", "p6", "val", BLUE)],
    )
    probe = Probe(tmp_path, SPEC, SETTINGS, seed=1)
    assert len(probe.patches) == 4 * 5
    found = probe(Colour())
    assert found["knn_balanced_accuracy"] == 1
    assert 1 <= found["rankme"] <= 3


def test_probe_of_one_patient_a_class_has_only_wrong_neighbours(tmp_path):
    write_cohort(tmp_path, [("a", "p1", "train", RED), ("b", "p2", "train", BLUE)])
    assert Probe(tmp_path, SPEC, SETTINGS, 1)(Colour())["knn_balanced_accuracy"] == 0


def test_probe_without_two_classes_gives_rankme_alone(tmp_path):
    write_cohort(tmp_path, [("a", "p1", "train", RED), ("a", "p2", "train", BLUE)])
    assert set(Probe(tmp_path, SPEC, SETTINGS, 1)(Colour())) == {"rankme"}


def test_probe_leaves_the_encoder_as_it_was(tmp_path):
    write_cohort(tmp_path, [("a", "p1", "train", RED), ("b", "p2", "train", BLUE)])
    encoder = nn.Sequential(Colour().eval(), nn.Dropout(0.5)).train()
    encoder[0].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    Probe(tmp_path, SPEC, SETTINGS, 1)(encoder)
    assert [part.training for part in encoder] == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_modes_come_back_after_an_error():
    layer = nn.Dropout().train()
    with pytest.raises(KeyError), evaluating(layer):
        assert not layer.training
        raise KeyError
    assert layer.training


def test_probe_says_what_must_run_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `dvc repro cohort` first"):
        Probe(tmp_path, SPEC, SETTINGS, 1)


@pytest.mark.parametrize("image_px", [8, 16, 24])
def test_patches_are_held_no_larger_than_images_and_embedded_as_they_would_be(tmp_path, image_px):
    write_cohort(tmp_path, [("a", "p1", "train", RED), ("b", "p2", "train", BLUE)])
    spec = dataclasses.replace(SPEC, image_px=image_px)
    held = torch.from_numpy(Probe(tmp_path, spec, SETTINGS, 1).patches)
    assert held.shape == (10, *[min(image_px, 16)] * 2, 3)
    whole = [
        stores.open_patches(tmp_path / "tile" / name / "patches.zarr")[at]
        for name in ("s00", "s01")
        for at in range(5)
    ]
    wanted = encoders.prepare(torch.from_numpy(np.stack(whole)), spec)
    torch.testing.assert_close(encoders.prepare(held, spec), wanted, rtol=0, atol=0.501 / 255)


def test_of_more_slides_than_patches_some_give_one(tmp_path):
    write_cohort(tmp_path, [("ab"[at % 2], f"p{at}", "train", RED) for at in range(9)])
    few = dataclasses.replace(SETTINGS, probe_patches=4)
    probes = [Probe(tmp_path, SPEC, few, seed) for seed in (1, 1, 2)]
    assert [len(probe.patches) for probe in probes] == [4, 4, 4]
    assert np.array_equal(probes[0].patches, probes[1].patches)
    assert not np.array_equal(probes[0].patches, probes[2].patches)


def test_slides_without_patches_are_passed_over_or_told(tmp_path):
    write_cohort(tmp_path, [("a", "p1", "train", RED), ("b", "p2", "train", BLUE)])
    emptied(tmp_path / "tile" / "s00")
    probe = Probe(tmp_path, SPEC, SETTINGS, 1)
    assert len(probe.patches) == 5
    assert probe(Colour())["rankme"] >= 1
    emptied(tmp_path / "tile" / "s01")
    with pytest.raises(ValueError, match=r"no train slide has a patch .*probe_epochs to 0"):
        Probe(tmp_path, SPEC, SETTINGS, 1)


def emptied(slide) -> None:
    shutil.rmtree(slide)
    slide.mkdir()
    attributes = {"slide_id": slide.name, "mpp": 0.5, "slide_mpp": 0.5, "input": ""}
    none = np.zeros((0, 2), np.int64)
    stores.create_patches(slide / "patches.zarr", [], none, 16, attributes, "zstd")
