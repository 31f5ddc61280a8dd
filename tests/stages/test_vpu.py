"""VPU: who is benign and who may be either, what is learned, exact resume, the exported CNN."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cytossl_core.cnn import PatchCNN
from stages.common import card, cohort, encoders, params, preflight
from stages.common.chance import keys_of
from stages.common.cohort import SlideRow
from stages.common.paired import PairedViews
from stages.common.ranks import Ranks
from stages.methods import vpu
from tests.stages import runs

VPU = vpu.Params((0.5, 1.0), 180.0, 0.5, 0.0, 0.3, 0.03)
TOP = params.Top(seed=7, sparse_topk=0, irpe="none")
SETTINGS = runs.changed(
    method="vpu", backbone="vpu_cnn_384", token_px=0, batch=4, learning_rate=0.05, global_px=32
)


def rows(**changes: tuple[str, str]) -> list[SlideRow]:
    """Slides a and b benign, c other, all of them train slides; d is a test slide."""
    about = {"a": ("well", "train"), "b": ("well", "train"), "c": ("ill", "train")}
    about |= {"d": ("well", "test")} | changes
    return [
        SlideRow(name, "", label, f"p-{name}", split, "0.5", "")
        for name, (label, split) in about.items()
    ]


@pytest.fixture
def labelled(source: Path) -> Path:
    """The views of four slides, and their labels."""
    runs.a_slide(source, "d", 5)
    write(source.parent)
    return source


def write(data: Path, classes: tuple[str, ...] = ("well", "ill"), **changes) -> None:
    (data / "cohort").mkdir(exist_ok=True)
    cohort.write_rows(data / "cohort", rows(**changes), list(classes))


def train(source: Path, settings=SETTINGS, target: str = "made") -> Path:
    return runs.train(source, settings, VPU, TOP, target)


def test_patches_come_benign_and_other_in_turn_and_test_slides_never(labelled):
    views = PairedViews(labelled.parent)
    assert views.slide_ids == ["a", "b", "c"] and len(views) == 18  # 7 benign, 11 others
    for epoch in range(3):
        order = views.order(3, epoch)
        assert len(order) == 18 and (order[0::2] < 7).all() and (order[1::2] >= 7).all()
        assert set(order[0::2]) == set(range(7)) and len(set(order[1::2])) == 9
    assert not np.array_equal(views.order(3, 0), views.order(3, 1))
    assert np.array_equal(views.order(3, 1), views.order(3, 1))


def test_another_label_is_other_data(labelled):
    before = PairedViews(labelled.parent).digest
    write(labelled.parent, d=("ill", "test"))
    assert PairedViews(labelled.parent).digest == before
    write(labelled.parent, b=("ill", "train"))
    assert PairedViews(labelled.parent).digest != before


def test_benign_patches_among_the_others_are_found():
    """Half of the unlabelled look benign; the encoder can only see how bright a patch is."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 8)
    )
    encoder.num_features = 8
    method = vpu.build(encoder, VPU, 32)
    images = 0.3 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images[3::4] += 1.0
    adam = torch.optim.Adam(method.parameters(), 0.01)
    for step in range(150):
        adam.zero_grad()
        method([images], 0.0, keys_of(0, step, torch.arange(64))).backward()
        adam.step()
    with torch.no_grad():
        phi = method.classifier(torch.relu(method.encoder(images))).softmax(1)[:, 1]
    assert phi[0::2].min() > 0.7 and phi[1::4].min() > 0.7 and phi[3::4].max() < 0.3
    seen = method.monitor(0.0)
    assert seen["phi_benign"] > seen["phi_unlabeled"] > 0.3 and seen["embedding_std"] > 0


def test_mixing_follows_the_keys_alone():
    method = vpu.build(PatchCNN(8, 32), VPU, 32)
    keys = keys_of(0, 0, torch.arange(6))
    torch.manual_seed(1)
    share, order = method._mixing(keys, 3)
    torch.manual_seed(2)
    again = method._mixing(keys, 3)
    assert share == again[0] and torch.equal(order, again[1])
    assert share != method._mixing(keys_of(0, 1, torch.arange(6)), 3)[0]
    drawn = [method._mixing(keys_of(0, at, torch.arange(2)), 1)[0] for at in range(2000)]
    # Beta(0.3, 0.3): mean 1/2, variance 1 / (4 (2 * 0.3 + 1))
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.03)
    assert np.var(drawn) == pytest.approx(1 / 6.4, abs=0.01)


def test_a_stopped_run_goes_on_to_the_same_bits(labelled, monkeypatch):
    whole = runs.weights(train(labelled))
    shutil.rmtree("cache/pretrain")
    save = pretrain_save(monkeypatch)
    with pytest.raises(InterruptedError):
        train(labelled, target="broken")
    save.undo()
    assert runs.checkpoints()
    assert runs.weights(train(labelled, target="again")) == whole


def pretrain_save(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A kill right after the second checkpoint."""
    from stages.common import checkpoint

    real, saved = checkpoint.save, []

    def save(*given: object) -> None:
        real(*given)
        saved.append(given)
        if len(saved) == 2:
            raise InterruptedError

    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoint, "save", save)
    return patch


def test_the_encoder_loads_as_its_card_says(labelled):
    folder = train(labelled) / "pretrained"
    text = (folder / card.CARD).read_text()
    assert "| splits | train, with labels |" in text
    lines = text.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    code = lines.replace('"encoder', f'"{folder}/encoder')
    exec(code, names)  # noqa: S102 - it is what the card tells people to run
    images = torch.randn(2, 3, 32, 32)
    model, spec = encoders.load(folder)
    assert torch.equal(names["encoder"](images), model(images))
    assert model(images).shape == (2, 384) and spec.architecture == "vpu_cnn_384"


@pytest.mark.parametrize(
    ("classes", "changes", "message"),
    [
        (("well", "ill", "odd"), {"b": ("odd", "train")}, "the cohort has 3"),
        (("well", "ill"), {"c": ("ill", "test")}, "no view .* train slide of class ill"),
        (
            ("well", "ill"),
            {"a": ("well", "val"), "b": ("ill", "train")},
            "no view .* train slide of class well",
        ),
    ],
)
def test_rejects_labels_that_make_no_pairs(labelled, classes, changes, message):
    write(labelled.parent, classes, **changes)
    with pytest.raises(ValueError, match=message):
        train(labelled)


def test_rejects_batches_and_processes_that_part_the_pairs(labelled):
    with pytest.raises(ValueError, match=r"pretrain.batch is 5: .* a multiple of 2"):
        train(labelled, dataclasses.replace(SETTINGS, batch=5))
    with pytest.raises(ValueError, match=r"pretrain.batch is 6: .* a multiple of 4"):
        train(labelled, dataclasses.replace(SETTINGS, batch=6, accumulate=2))
    with pytest.raises(ValueError, match="runs in one process, and there are 2"):
        preflight.check_pairs(SETTINGS, Ranks(0, 2, torch.device("cpu")).count)
    with pytest.raises(ValueError, match=r"pretrain.splits is \['val'\]"):
        train(labelled, dataclasses.replace(SETTINGS, splits=("val",)))
    method = vpu.build(PatchCNN(8, 32), VPU, 32)
    with pytest.raises(ValueError, match="a pass of pretrain.method vpu has 3 patches"):
        method([torch.zeros(3, 3, 32, 32)], 0.0, keys_of(0, 0, torch.arange(3)))


def test_only_slides_of_the_chosen_splits_train(labelled):
    """For every method: `pretrain.splits` keeps test slides' pixels out."""
    few = runs.changed(epochs=1, splits=("train", "val"))
    assert preflight.slides_of(few, labelled.parent / "cohort") == {"a", "b", "c"}
    assert preflight.slides_of(runs.changed(), labelled.parent / "none") is None
    with_test = runs.train(labelled, runs.changed(epochs=1), target="all")
    without = runs.train(labelled, few, target="few")
    assert runs.weights(with_test) != runs.weights(without)
    shutil.rmtree(labelled / "d")
    shutil.rmtree("cache/pretrain")
    assert runs.weights(runs.train(labelled, few, target="again")) == runs.weights(without)


def test_a_cnn_needs_images_of_some_size():
    with pytest.raises(ValueError, match="image_px is 15: it must be 16 or more"):
        PatchCNN(8, 15)
