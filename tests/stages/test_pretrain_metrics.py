"""What a pretraining run tells of itself: metrics and what the data chose."""

import dataclasses
import json

import numpy as np
import pytest

from stages import pretrain
from stages.common import card, encoders, optimizer
from tests.stages.runs import DINO, changed, curve, forget_checkpoints, train


def test_metrics_are_of_the_last_epoch_wherever_the_rows_are(source, monkeypatch):
    monkeypatch.setattr(pretrain, "Probe", lambda *_: lambda encoder: {"rankme": norm_of(encoder)})
    watch = dataclasses.replace(changed().watch, probe_epochs=2)
    made = train(source, changed(watch=watch, log_steps=1))
    metrics = json.loads((made / "metrics.json").read_text())
    for name in ("loss", "gradient_norm"):
        wanted = np.mean([value for step, value in curve(made, name) if step > 6])
        assert metrics[name] == pytest.approx(wanted), name
    for steps in (2, 5, 99):
        forget_checkpoints()
        again = train(source, changed(watch=watch, log_steps=steps), target="again")
        assert (again / "metrics.json").read_bytes() == (made / "metrics.json").read_bytes()


def norm_of(encoder) -> float:
    return sum(value.square().sum().item() for value in encoder.parameters())


def test_prototypes_chosen_by_the_data_are_told_and_make_the_run_of_that_number(
    source, monkeypatch
):
    made = train(source, changed(epochs=1), dataclasses.replace(DINO, prototypes="auto"))
    described = json.loads((made / "pretrained" / encoders.DESCRIPTION).read_text())
    assert described["provenance"]["params"]["pretrain"]["dino"]["prototypes"] == 1024
    assert json.loads((made / "metrics.json").read_text())["prototypes"] == 1024
    assert "| prototypes | 1024 |" in (made / "pretrained" / card.CARD).read_text()
    monkeypatch.setattr(optimizer, "clip_each", lambda *_: pytest.fail("a step was taken"))
    train(source, changed(epochs=1), dataclasses.replace(DINO, prototypes=1024))
