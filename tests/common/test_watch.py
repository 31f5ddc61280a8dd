"""Watching a run: the neighbours' vote, RankMe, the probe on real stores, and the alarm."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from stages.common import cohort, encoders, stores
from stages.common.cohort import SlideRow
from stages.common.watch import (
    Probe,
    WatchParams,
    evaluating,
    knn_votes,
    raise_alarm,
    rankme,
)

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


def test_a_probe_is_due_once_in_its_epochs():
    # rows every 4 steps, 5 steps an epoch, a probe every 2 epochs: after steps 10, 20, ...
    assert [step for step in range(4, 41, 4) if SETTINGS.due(step, 4, 5)] == [12, 20, 32, 40]
    never = WatchParams(0, 1, 1, 1.0, 1)
    assert not any(never.due(step, 1, 5) for step in range(40))


def rows_of(name: str, values: list[float]) -> list[dict[str, float]]:
    healthy = {"embedding_std": 0.5, "teacher_entropy": 0.7, "prototypes_entropy": 0.9}
    return [{"step": at, **healthy, name: value} for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("embedding_std", 0.001, "same embedding .* pretrain.learning_rate"),
        ("teacher_entropy", 1.0, "uniform, .* pretrain.dino.teacher_temperature"),
        ("prototypes_entropy", 0.0, "one prototype"),
    ],
)
def test_alarm_names_the_sign_and_the_remedy(name, value, what):
    message = rf"pretraining collapsed: {name} is {value:.4g} at step 4 and in the 3 rows.*{what}"
    with pytest.raises(ValueError, match=message):
        raise_alarm(rows_of(name, [0.5, 0.5] + [value] * 3), 0.6, SETTINGS)


def test_alarm_waits_for_its_time_and_for_enough_rows():
    bad = [0.001] * 3
    raise_alarm(rows_of("embedding_std", bad), 0.49, SETTINGS)
    raise_alarm(rows_of("embedding_std", bad[:2]), 0.9, SETTINGS)
    raise_alarm(rows_of("embedding_std", [*bad, 0.3]), 0.9, SETTINGS)
    raise_alarm([{"step": 1, "loss": 3.0}] * 3, 0.9, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "watch.neighbours is 0: it must be 1 or more"),
        ({"probe_epochs": -1}, "probe_epochs is -1"),
        ({"collapse_after": 1.5}, "collapse_after 1.5"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        WatchParams(**{**vars(SETTINGS), **changes})
