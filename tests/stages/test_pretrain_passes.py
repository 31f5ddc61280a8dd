"""How a step is computed changes memory and speed; the numbers stay, or it is said what changes."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from stages import pretrain
from stages.common import checkpoint, encoders, optimizer, params
from stages.methods.dino import DINO as Method
from tests.stages import runs
from tests.stages.runs import (
    DINO,
    STEPS,
    TOP,
    assert_close,
    changed,
    checkpoints,
    curve,
    forget_checkpoints,
    train,
    weights,
)


@contextmanager
def failing_after(steps: int) -> Iterator[None]:
    """The run inside fails in the step after so many."""
    clip, calls = optimizer.clip_each, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > steps:
            raise RuntimeError("failed here")
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "clip_each", failing)
        with pytest.raises(RuntimeError, match="^failed here$"):
            yield


def test_passes_of_a_step_give_the_numbers_of_its_whole(source):
    settings = changed(batch=6, drop_path=0.0, epochs=9)
    whole = train(source, settings, target="whole")
    for passes in (2, 6):
        parts = train(source, dataclasses.replace(settings, accumulate=passes))
        assert_close(parts, whole)


def test_activations_computed_again_give_equal_bits_and_go_on_with_a_run(source, monkeypatch):
    settings = changed(gradient_checkpointing=True)
    plain = train(source, target="plain")
    forget_checkpoints()
    calls, original = [], torch.utils.checkpoint.checkpoint
    counted = lambda *given, **named: calls.append(1) or original(*given, **named)  # noqa: E731
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    assert weights(train(source, settings)) == weights(plain)
    assert calls
    assert json.loads((plain / "pretrained" / encoders.DESCRIPTION).read_text()) == json.loads(
        (source.parent / "made" / "pretrained" / encoders.DESCRIPTION).read_text()
    )


def test_fp16_leaves_out_steps_that_overflow_and_resumes_with_its_scale(source):
    settings = changed(autocast="fp16", epochs=8, log_steps=1, keep_checkpoints=99)
    made = train(source, settings, target="unbroken")
    skipped = [bool(count) for _, count in curve(made, "skipped_steps")]
    assert skipped[0] and not skipped[-1]
    assert all(math.isfinite(norm) for _, norm in curve(made, "gradient_norm"))
    forget_checkpoints()
    with failing_after(3):
        train(source, settings)
    [file] = checkpoints()
    state = torch.load(file, weights_only=True)
    assert state["scaler"]["scale"] == 2.0**14  # 65536, halved by each of the first two overflows
    assert not state["optimizer"]["state"]  # no step was taken, nor did the teacher move
    before = load_file(made / "untrained" / encoders.WEIGHTS)
    for name, value in before.items():
        assert torch.equal(state["method"][f"teacher.encoder.{name}"], value)
    assert weights(train(source, settings)) == weights(made)


def test_fp16_that_never_stops_overflowing_is_a_divergence(source, monkeypatch):
    forward = Method.forward

    def steep(self, *given):
        return forward(self, *given) + (self.student.head.prototypes.weight[0, 0] * 0).abs().sqrt()

    monkeypatch.setattr(Method, "forward", steep)
    with pytest.raises(ValueError, match=r"norm of its gradient nan at step 16: both .*autocast"):
        train(source, changed(autocast="fp16", epochs=12))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
def test_out_of_memory_names_what_to_turn(source, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(Method, "forward", full)
    message = (
        r"out of memory with 2 patches in a pass of one device: raise pretrain\.accumulate \(now 3"
        r"\), set gradient_checkpointing to true \(now False\) or autocast to bf16 \(now none\), "
        r"or lower pretrain\.batch \(now 6\); torch says: .* allocate 9"
    )
    with pytest.raises(ValueError, match=message):
        train(source, changed(batch=6, accumulate=3))


def test_another_error_stays_what_it_is(source):
    with failing_after(0):
        train(source)


def test_collapse_stops_the_run_and_says_why(source, monkeypatch):
    monitor = Method.monitor
    collapsed = lambda self, at: {**monitor(self, at), "embedding_std": 0.001}  # noqa: E731
    monkeypatch.setattr(Method, "monitor", collapsed)
    about = dataclasses.replace(changed().watch, collapse_after=0.6)
    with pytest.raises(ValueError, match=r"collapsed: embedding_std is 0\.001 at step 8 .*Lower"):
        train(source, changed(watch=about))
    assert [file.name for file in checkpoints()] == ["step-000000004.pt", "step-000000006.pt"]


def test_probe_joins_the_curves_and_changes_no_weight(source, monkeypatch):
    plain = train(source, target="plain")
    forget_checkpoints()
    seen = []

    def probe(data, spec, settings, seed):
        assert (data, spec.image_px, seed) == (source.parent, 24, TOP.seed)
        torch.randn(1)
        return lambda encoder: seen.append(encoder) or {"rankme": 5.0 + len(seen)}

    monkeypatch.setattr(pretrain, "Probe", probe)
    about = dataclasses.replace(changed().watch, probe_epochs=1)
    made = train(source, changed(watch=about))
    assert curve(made, "rankme") == [(4, 6.0), (6, 7.0), (9, 8.0)]  # epochs end at 3, 6 and 9
    assert json.loads((made / "metrics.json").read_text())["rankme"] == 8.0
    assert weights(made) == weights(plain)
    assert len(checkpoints()) == 0


def test_probe_switched_on_after_the_run_is_made_of_its_end(source, monkeypatch):
    train(source)
    monkeypatch.setattr(pretrain, "Probe", lambda *_: lambda encoder: {"rankme": 4.5})
    about = dataclasses.replace(changed().watch, probe_epochs=1)
    monkeypatch.setattr(pretrain, "train", None)  # no step is taken again
    made = train(source, changed(watch=about))
    assert curve(made, "rankme") == [(STEPS, 4.5)]
    assert len(curve(made, "loss")) == 5
    assert json.loads((made / "metrics.json").read_text())["rankme"] == 4.5


def test_rows_further_apart_are_the_same_run(source):
    unbroken = train(source, target="unbroken")
    forget_checkpoints()
    with failing_after(5):
        train(source)
    made = train(source, changed(log_steps=3))
    assert weights(made) == weights(unbroken)
    assert [step for step, _ in curve(made, "loss")] == [2, 4, 6, 9]


def test_masked_tokens_are_not_compiled(source):
    masked = dataclasses.replace(DINO, ibot=dataclasses.replace(DINO.ibot, weight=0.5))
    with pytest.raises(ValueError, match=r"compile is true .*dino\.ibot\.weight is 0\.5"):
        train(source, changed(compile=True), masked)


def test_finished_run_leaves_its_encoder_only(source):
    made = train(source)
    [file] = (source.parent.parent / "cache" / "pretrain").rglob("*.pt")
    assert file.name == checkpoint.FINISHED
    state = torch.load(file, weights_only=True)
    assert state["step"] == STEPS
    assert sorted(state) == ["encoder", "journal", "made", "step"]
    assert file.stat().st_size < 1.5 * (made / "pretrained" / encoders.WEIGHTS).stat().st_size + 1e5


def test_damaged_checkpoint_costs_its_steps_only(source, caplog):
    unbroken = train(source, target="unbroken")
    forget_checkpoints()
    with failing_after(7):
        train(source)
    newest = checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert weights(train(source)) == weights(unbroken)
    assert f"{newest} is damaged" in caplog.text


def test_checkpoint_put_in_from_another_run_is_refused(source):
    for settings in (changed(), changed(learning_rate=0.02)):
        with failing_after(3):
            train(source, settings)
    [first, second] = sorted(checkpoints(), key=lambda file: file.stat().st_mtime)
    first.replace(second)
    message = r"of another run \(params\.pretrain\.learning_rate: 0\.01 there, 0\.02 here\): move"
    with pytest.raises(ValueError, match=message):
        train(source, changed(learning_rate=0.02))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # dynamo says what it leaves uncompiled
def test_student_and_teacher_are_compiled_at_both_resolutions(source, monkeypatch):
    compiled, original = [], torch.nn.Module.compile

    def traced(self, **named):  # as inductor would take it, without minutes of its C++
        compiled.append(type(self).__name__)
        original(self, backend="aot_eager", **named)

    settings = changed(batch=9, drop_path=0.0, epochs=6, learning_rate=0.05)
    top = params.Top(TOP.seed, 0, "k")  # with tables, lengths that vary cannot be compiled
    plain = train(source, settings, top=top, target="plain")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    made = train(source, dataclasses.replace(settings, compile=True), top=top)
    assert_close(made, plain)
    assert compiled == ["VisionTransformer"] * 2


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"batch": 5}, 2, r"batch is 5: it must be a multiple of 2, 2 processes x 1 .* example 4"),
        ({"batch": 4}, 8, r"batch is 4: it must be a multiple of 8, 8 processes .* example 8"),
        ({"batch": 6, "accumulate": 4}, 1, r"multiple of 4, 1 processes x 4 passes \(accumulate"),
    ],
)
def test_rejects_a_batch_that_cannot_be_dealt_out(source, monkeypatch, values, processes, message):
    monkeypatch.setattr(runs, "ALONE", dataclasses.replace(runs.ALONE, count=processes))
    with pytest.raises(ValueError, match=message):
        train(source, changed(**values))


def test_rejects_no_prototypes():
    with pytest.raises(ValueError, match=r"pretrain\.dino\.prototypes is 0: it must be 2 or more"):
        dataclasses.replace(DINO, prototypes=0)
