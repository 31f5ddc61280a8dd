"""Pretrain: the same weights from the same inputs, also after a kill; what stops it says why."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.common import cache, encoders, optimizer, stores, viewset
from tests.stages.runs import (
    DINO,
    PX,
    STEPS,
    TOP,
    a_slide,
    changed,
    checkpoints,
    curve,
    forget_checkpoints,
    start,
    train,
    wait_for_checkpoint,
    weights,
    write_params,
)


def test_writes_two_encoders_a_picture_curves_and_metrics(source):
    made = train(source)
    _, spec = encoders.load(made / "pretrained")
    assert (spec.image_px, spec.token_px, spec.patch_px, spec.mpp) == (24, 8, PX, 0.5)
    assert (spec.sparse_topk, spec.irpe) == (3, "k")
    encoders.load(made / "untrained")
    assert weights(made) != weights(made, "untrained")
    metrics = json.loads((made / "metrics.json").read_text())
    assert (metrics["epochs"], metrics["steps"], metrics["views"]) == (3, STEPS, 18)
    assert [step for step, _ in curve(made, "loss")] == [2, 4, 6, 8, 9]
    # A row for each of 5 patches, a column for the patch and each of 3 views, 2 px between.
    assert cv2.imread(str(made / "views.png")).shape == (5 * (PX + 2), 4 * (PX + 2), 3)


def test_untrained_is_the_network_before_the_first_step(source):
    made = train(source)
    _, spec = encoders.load(made / "untrained")
    torch.manual_seed(TOP.seed)
    fresh = encoders.build(spec).state_dict()
    for name, value in load_file(made / "untrained" / encoders.WEIGHTS).items():
        assert torch.equal(value, fresh[name]), name


def test_equal_inputs_give_equal_bytes_and_another_seed_does_not(source):
    first = train(source)
    forget_checkpoints()
    again = train(source, target="again")
    for name in ("metrics.json", "views.png", "pretrained/encoder.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert weights(first) == weights(again)
    other = train(source, top=dataclasses.replace(TOP, seed=8), target="other")
    assert weights(first) != weights(other)


def test_readers_in_other_processes_change_nothing_and_start_no_new_run(source):
    first = train(source)
    forget_checkpoints()
    again = train(source, changed(workers=2, checkpoint_steps=4), target="again")
    assert weights(first) == weights(again)
    assert len(list((cache.root() / "pretrain").glob("*/*"))) == 1


def test_finished_run_is_not_trained_again(source, monkeypatch):
    first = train(source)
    monkeypatch.setattr(optimizer, "clip_each", lambda *_: pytest.fail("a step was taken"))
    again = train(source, target="again")
    assert weights(first) == weights(again)
    assert curve(first, "images_per_second") == curve(again, "images_per_second")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_leaves_a_checkpoint_and_goes_on_to_equal_bits(source, monkeypatch, number):
    unbroken = train(source, target="unbroken")
    forget_checkpoints()
    clip, calls = optimizer.clip_each, []

    def stop_in_step_5(*arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return clip(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(optimizer, "clip_each", stop_in_step_5)
    with pytest.raises(SystemExit) as left:
        train(source)
    assert left.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert [file.name for file in checkpoints()] == ["step-000000004.pt", "step-000000005.pt"]
    made = train(source)
    assert len(calls) == STEPS
    assert weights(made) == weights(unbroken)
    assert (made / "metrics.json").read_bytes() == (unbroken / "metrics.json").read_bytes()
    assert curve(made, "loss") == curve(unbroken, "loss")


def test_killed_run_ends_with_the_bits_of_an_unbroken_one(source):
    settings = changed(epochs=12, batch=6, accumulate=3)
    write_params(Path(), settings)
    child = start()
    wait_for_checkpoint(child)
    time.sleep(random.random() / 4)  # some steps more, or in the middle of one
    child.kill()
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors
    assert int(re.search(r"\d+", checkpoints()[-1].name)[0]) < 12 * 3
    made = train(source, settings)
    assert [step for step, _ in curve(made, "loss")] == list(range(2, 37, 2))
    forget_checkpoints()
    assert weights(made) == weights(train(source, settings, target="unbroken"))


def test_loss_falls_and_embeddings_stay_apart(source):
    settings = changed(epochs=20, batch=9, warmup_epochs=4, drop_path=0.0, checkpoint_steps=40)
    alike = {"jitter": 0.0, "flip": 0.0, "rotation_degrees": 0.0}  # views that are easy to match
    scales = {"global_scale": (0.6, 1.0), "local_scale": (0.3, 0.6)}
    made = train(source, settings, dataclasses.replace(DINO, momentum=0.95, **alike, **scales))
    losses = [loss for _, loss in curve(made, "loss")]
    assert losses[0] == pytest.approx(math.log(17), abs=0.5)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert curve(made, "embedding_std")[-1][1] > 0.5
    assert curve(made, "prototypes_entropy")[-1][1] > 1.5 * curve(made, "teacher_entropy")[-1][1]


def test_another_setting_starts_anew(source):
    train(source)
    train(source, changed(learning_rate=0.02), target="other")
    train(source, of_method=dataclasses.replace(DINO, momentum=0.8), target="third")
    assert len(list((cache.root() / "pretrain").glob("*/*"))) == 3


def test_divergence_names_the_step_and_keeps_finite_checkpoints(source, monkeypatch):
    clip, calls = optimizer.clip_each, []

    def infinite_in_step_5(*arguments):
        calls.append(1)
        return clip(*arguments) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(optimizer, "clip_each", infinite_in_step_5)
    message = r"nan at step 5: .* lower pretrain.* begins a new run; the checkpoints .* stay in "
    with pytest.raises(ValueError, match=message):
        train(source)
    [first, last] = checkpoints()
    assert [first.name, last.name] == ["step-000000002.pt", "step-000000004.pt"]
    state = torch.load(last, weights_only=True)
    assert all(value.isfinite().all() for value in state["method"].values())


def test_weights_that_the_last_step_broke_are_not_exported(source, monkeypatch):
    schedule, calls = optimizer.schedule, []

    def broken_at_the_end(adam, learning_rate, weight_decay):
        calls.append(1)
        last = len(calls) == 18
        schedule(adam, math.inf if last else learning_rate, weight_decay)

    monkeypatch.setattr(optimizer, "schedule", broken_at_the_end)
    with pytest.raises(ValueError, match="not finite after the last step, 18: nothing is exported"):
        train(source, changed(epochs=6), target="broken")
    assert not list(Path(".").rglob("broken/pretrained")) and len(calls) == 18


def test_bfloat16_trains(source):
    made = train(source, changed(autocast="bf16"))
    assert math.isfinite(json.loads((made / "metrics.json").read_text())["loss"])


def test_order_is_new_each_epoch_and_the_same_from_any_step(source):
    data = viewset.ViewSet(source, source.parent / "tile")
    rows = list(viewset.rows_of(data, 5, 3, range(9)))
    for epoch in range(3):
        drawn = [row for batch in rows[3 * epoch : 3 * epoch + 3] for row in batch]
        assert len(set(drawn)) == 15
        assert max(drawn) < 18
    assert rows[:3] != rows[3:6]
    assert list(viewset.rows_of(data, 5, 3, range(4, 9))) == rows[4:]
    assert list(viewset.rows_of(data, 5, 4, range(9))) != rows


def test_data_set_numbers_patches_by_slide(source):
    data = viewset.ViewSet(source, source.parent / "tile")
    third = stores.open_views(source / "c" / "views.zarr")
    assert len(data) == 18
    for row, (store, inner) in {0: (data.stores[0], 0), 7: (third, 0), 17: (third, 10)}.items():
        pixels, points, number, seed = data[row]
        assert np.array_equal(pixels, store[inner])
        assert np.array_equal(points, store.points_of(inner))
        assert (number, seed) == (row, 0)  # no shuffle is left to make
    batch = viewset.collate([data[row] for row in (0, 9, 8)])  # with 0, 2 and 1 points
    assert batch.points.isnan().any(2).tolist() == [[True, True], [False, False], [False, True]]
    assert batch.rows.tolist() == [0, 9, 8]


def test_rejects_a_batch_larger_than_the_data(source):
    with pytest.raises(ValueError, match=r"batch is 19: .* made 18 views"):
        train(source, changed(batch=19))


def test_says_that_there_are_no_views(source):
    for name in ("a", "c"):
        shutil.rmtree(source / name)
    with pytest.raises(ValueError, match="made no views of the slides that train: add slides or"):
        train(source)


def test_rejects_views_that_tokens_do_not_fill(source):
    with pytest.raises(ValueError, match=r"pretrain\.dino asks for views of 17 px: .*token_px, 8"):
        train(source, of_method=dataclasses.replace(DINO, local_px=17))


def test_rejects_slides_of_two_resolutions(source):
    a_slide(source, "z", 3, px=33)
    with pytest.raises(ValueError, match=r"patches of 31 px at 0\.5 mpp, 33 px at 0\.5 mpp"):
        train(source)


def test_rejects_an_unknown_method_and_an_absent_stage(source):
    with pytest.raises(ValueError, match="no 'dyno' in stages/methods: choose one of byol, dino"):
        train(source, changed(method="dyno"))
    with pytest.raises(FileNotFoundError, match="run `dvc repro perturb`"):
        train(source.parent / "absent" / "perturb")
