"""Pretrain: the same weights from the same inputs, also after a kill; what stops it says why."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages import pretrain
from stages.common import cache, checkpoint, encoders, optimizer, params, stores, viewset
from stages.common.spec import LoraParams
from stages.methods import dino
from stages.methods._masked import Masking

ROOT = Path(__file__).resolve().parents[2]
TOP = params.Top(seed=7, sparse_topk=3, irpe="k")
SETTINGS = pretrain.PretrainParams(
    method="dino",
    backbone="test_vit",
    weights="none",
    init_from="",
    adapter="none",
    lora=LoraParams(rank=2, alpha=4.0, dropout=0.0),
    token_px=8,
    global_px=24,
    drop_path=0.1,
    epochs=3,
    batch=5,
    optimizer="adam",
    learning_rate=0.01,
    final_learning_rate=1e-6,
    warmup_epochs=0.5,
    weight_decay=0.0,
    final_weight_decay=0.01,
    clip_norm=3.0,
    autocast="none",
    workers=0,
    log_steps=2,
    checkpoint_steps=2,
)
DINO = dino.Params(
    local_views=1,
    local_px=16,
    global_scale=(0.4, 1.0),
    local_scale=(0.1, 0.4),
    rotation_degrees=180.0,
    flip=0.5,
    jitter=0.8,
    gray=0.0,
    blur=(0.0, 0.0, 0.0),
    solarize=0.0,
    prototypes=17,
    hidden_dim=19,
    bottleneck_dim=11,
    student_temperature=0.1,
    teacher_temperature_start=0.04,
    teacher_temperature=0.04,
    teacher_temperature_warmup=0.3,
    center_momentum=0.9,
    momentum=0.9,
    freeze_prototypes=0.1,
    koleo_weight=0.0,
    ibot=Masking(weight=0.0, chance=0.5, share=(0.1, 0.5)),
)
COUNTS, PX = {"a": 7, "b": 0, "c": 11}, 31  # 18 patches: 3 steps of 5 in an epoch, 9 in the run
STEPS = 9


def changed(**values) -> pretrain.PretrainParams:
    return dataclasses.replace(SETTINGS, **values)


def a_slide(source: Path, name: str, count: int, px: int = PX, mpp: float = 0.5) -> None:
    """A finished result of the perturb stage: stripes and blots, a nucleus or two in each."""
    rng = np.random.default_rng([ord(name[0]), px])
    patches = [cv2.GaussianBlur(rng.random((px, px, 3)), (0, 0), 2 + at % 3) for at in range(count)]
    attributes = {"slide_id": name, "mpp": mpp, "slide_mpp": 0.25, "input": "-"}
    per_patch = np.arange(count) % 3  # also patches without a point

    def make(folder: Path) -> None:
        stores.create_views(
            folder / "views.zarr",
            [cv2.normalize(patch, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U) for patch in patches],
            (rng.random((per_patch.sum(), 2)) * px).astype(np.float32),
            np.repeat(np.arange(count), per_patch),
            np.arange(count),
            px,
            attributes,
        )

    key = cache.key_of("perturb", name, (str(px), str(count)), {}, "")
    if not cache.entry("perturb", key).is_dir():
        cache.build("perturb", key, name, {}, make)
    cache.link(cache.entry("perturb", key), source / name)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    for name, count in COUNTS.items():
        a_slide(tmp_path / "data" / "perturb", name, count)
    return tmp_path / "data" / "perturb"


def train(source: Path, settings=SETTINGS, of_method=DINO, top=TOP, target="made") -> Path:
    """A run into a folder beside the source."""
    pretrain.main(source, source.parent / target, settings, of_method, top)
    return source.parent / target


def forget_checkpoints() -> None:
    for file in (cache.root() / "pretrain").rglob("step-*.pt"):
        file.unlink()


def weights(folder: Path, encoder: str = "pretrained") -> bytes:
    return (folder / encoder / encoders.WEIGHTS).read_bytes()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = (folder / "dvclive" / "plots" / "metrics" / f"{name}.tsv").read_text().split("\n")
    return [(int(a), float(b)) for a, b in (line.split("\t") for line in lines[1:] if line)]


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
    assert metrics["loss"] == pytest.approx(np.mean([y for x, y in curve(made, "loss") if x > 6]))
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
    names = sorted(file.name for file in (cache.root() / "pretrain").rglob("*.pt"))
    assert names == ["step-000000004.pt", "step-000000005.pt"]
    made = train(source)
    assert len(calls) == STEPS
    assert weights(made) == weights(unbroken)
    assert (made / "metrics.json").read_bytes() == (unbroken / "metrics.json").read_bytes()
    assert curve(made, "loss") == curve(unbroken, "loss")


def test_killed_run_ends_with_the_bits_of_an_unbroken_one(source):
    settings = changed(epochs=12)
    sections = {"pretrain": {**dataclasses.asdict(settings), "dino": dataclasses.asdict(DINO)}}
    plain = json.loads(json.dumps({**dataclasses.asdict(TOP), **sections}))
    Path("params.yaml").write_text(yaml.safe_dump(plain))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.pretrain"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not list((cache.root() / "pretrain").rglob("step-*.pt")) and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()
    child.stderr.close()
    [latest, *_] = sorted((cache.root() / "pretrain").rglob("step-*.pt"), reverse=True)
    assert int(re.search(r"\d+", latest.name)[0]) < 12 * 3
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
    with pytest.raises(ValueError, match=r"norm of its gradient nan at step 5: .* lower pretrain"):
        train(source)
    [first, last] = sorted((cache.root() / "pretrain").rglob("*.pt"))
    assert [first.name, last.name] == ["step-000000002.pt", "step-000000004.pt"]
    state = torch.load(last, weights_only=True)
    assert all(value.isfinite().all() for value in state["method"].values())


def test_bfloat16_trains(source):
    made = train(source, changed(autocast="bf16"))
    assert math.isfinite(json.loads((made / "metrics.json").read_text())["loss"])


def test_order_is_new_each_epoch_and_the_same_from_any_step():
    rows = list(viewset.rows_of(17, 5, 3, range(9)))
    for epoch in range(3):
        drawn = [row for batch in rows[3 * epoch : 3 * epoch + 3] for row in batch]
        assert len(set(drawn)) == 15
        assert max(drawn) < 17
    assert rows[:3] != rows[3:6]
    assert list(viewset.rows_of(17, 5, 3, range(4, 9))) == rows[4:]
    assert list(viewset.rows_of(17, 5, 4, range(9))) != rows


def test_data_set_numbers_patches_by_slide(source):
    data = viewset.ViewSet(source)
    third = stores.open_views(source / "c" / "views.zarr")
    assert len(data) == 18
    for row, (store, inner) in {0: (data.stores[0], 0), 7: (third, 0), 17: (third, 10)}.items():
        pixels, points, number = data[row]
        assert np.array_equal(pixels, store[inner])
        assert np.array_equal(points, store.points_of(inner))
        assert number == row
    batch = viewset.collate([data[row] for row in (0, 9, 8)])  # with 0, 2 and 1 points
    assert batch.points.isnan().any(2).tolist() == [[True, True], [False, False], [False, True]]
    assert batch.rows.tolist() == [0, 9, 8]


def test_gradients_are_clipped_tensor_by_tensor():
    torch.manual_seed(0)
    tensors = [torch.nn.Parameter(torch.empty(3, 5)), torch.nn.Parameter(torch.empty(7))]
    tensors.append(torch.nn.Parameter(torch.empty(2)))  # without a gradient
    for tensor, norm in zip(tensors, (10.0, 0.5), strict=False):
        tensor.grad = torch.randn_like(tensor)
        tensor.grad *= norm / tensor.grad.norm()
    before = [tensor.grad.clone() for tensor in tensors[:2]]
    assert optimizer.clip_each(tensors, 3.0).item() == pytest.approx(math.hypot(10, 0.5))
    torch.testing.assert_close(tensors[0].grad, before[0] * 0.3)
    torch.testing.assert_close(tensors[1].grad, before[1])
    optimizer.clip_each(tensors, 0.0)
    torch.testing.assert_close(tensors[0].grad, before[0] * 0.3)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_optimizer_decays_matrices_only(name):
    matrix, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,)))
    built = optimizer.build([matrix, bias], name)
    optimizer.schedule(built, 0.1, 0.5)
    matrix.grad, bias.grad = torch.zeros(2, 3), torch.zeros(3)
    built.step()
    # adamw: 1 - 0.1 * 0.5; adam: the decay is the gradient, and its first step has length 0.1.
    torch.testing.assert_close(matrix, torch.full((2, 3), {"adam": 0.9, "adamw": 0.95}[name]))
    torch.testing.assert_close(bias, torch.ones(3))


def test_learning_rate_is_in_proportion_to_the_batch():
    settings = changed(learning_rate=5e-4, batch=64, epochs=10, warmup_epochs=2.0)
    rates = [pretrain._rates(settings, at)["learning_rate"] for at in (0.0, 0.1, 0.2, 0.6)]
    peak = 5e-4 * 64 / 256
    assert rates == pytest.approx([0, peak / 2, peak, (peak + 1e-6) / 2])


def test_keeps_the_newest_checkpoints_and_sweeps_old_halves(tmp_path):
    part = torch.nn.Linear(2, 3)
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, step, {"part": part})
    fresh, stale = tmp_path / ".step-1.pt.1.tmp", tmp_path / ".step-2.pt.1.tmp"
    for file in (fresh, stale):
        file.touch()
    os.utime(stale, (0, 0))
    other = torch.nn.Linear(2, 3)
    assert checkpoint.resume(tmp_path, {"part": other}, torch.device("cpu")) == 11
    assert torch.equal(part.weight, other.weight)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [fresh.name, "step-000000010.pt", "step-000000011.pt"]
    empty = tmp_path / "empty"
    assert checkpoint.resume(empty, {"part": other}, torch.device("cpu")) == 0


def test_second_signal_is_not_held_back():
    with checkpoint.interruptible() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_px": 25}, r"pretrain\.global_px is 25: it must be a multiple of token_px, 8"),
        ({"epochs": 0}, r"pretrain\.epochs is 0: it must be 1 or more"),
        ({"warmup_epochs": 3.0}, r"warmup_epochs is 3\.0: it must be from 0 to below epochs, 3"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0: it must be above 0"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0: it must be from 0 to below 1"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0: it must be 0 or more"),
    ],
)
def test_rejects_settings_with_which_nothing_trains(values, message):
    with pytest.raises(ValueError, match=message):
        changed(**values)


def test_rejects_a_batch_larger_than_the_data(source):
    with pytest.raises(ValueError, match=r"batch is 19: .* made 18 views"):
        train(source, changed(batch=19))


def test_rejects_views_that_tokens_do_not_fill(source):
    with pytest.raises(ValueError, match=r"pretrain\.dino asks for views of 17 px: .*token_px, 8"):
        train(source, of_method=dataclasses.replace(DINO, local_px=17))


def test_rejects_slides_of_two_resolutions(source):
    a_slide(source, "z", 3, px=33)
    with pytest.raises(ValueError, match=r"patches of 31 px at 0\.5 mpp, 33 px at 0\.5 mpp"):
        train(source)


def test_rejects_an_unknown_method_and_an_absent_stage(source):
    with pytest.raises(ValueError, match="no 'dyno' in stages/methods: choose one of dino"):
        train(source, changed(method="dyno"))
    with pytest.raises(FileNotFoundError, match="run `dvc repro perturb`"):
        train(source.parent / "absent")
