"""Watching a run: when a probe is due, and the alarm."""

import pytest

from stages.common.watch import Alarm, WatchParams

SETTINGS = WatchParams(
    probe_epochs=2, probe_patches=24, neighbours=3, collapse_after=0.5, collapse_rows=3
)


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
        Alarm(SETTINGS, 0.1).look(rows_of(name, [0.5, 0.5] + [value] * 3), 0.6)


def test_alarm_waits_for_its_time_and_for_enough_rows(caplog):
    bad, alarm = [0.001] * 3, Alarm(SETTINGS, 0.1)
    alarm.look(rows_of("embedding_std", bad), 0.09)
    alarm.look(rows_of("embedding_std", bad[:2]), 0.9)
    alarm.look(rows_of("embedding_std", [*bad, 0.3]), 0.9)
    assert not caplog.text


def test_after_the_warm_up_a_collapse_is_warned_of_once_for_each_kind(caplog):
    alarm = Alarm(SETTINGS, 0.1)
    for progress in (0.1, 0.2, 0.3):
        alarm.look(rows_of("embedding_std", [0.001] * 3), progress)
    assert caplog.text.count("may have collapsed: embedding_std is 0.001 at step 2") == 1
    alarm.look(rows_of("teacher_entropy", [1.0] * 3), 0.4)
    assert caplog.text.count("may have collapsed") == 2
    with pytest.raises(ValueError, match="pretraining collapsed: embedding_std"):
        alarm.look(rows_of("embedding_std", [0.001] * 3), 0.5)


def test_views_that_are_as_alike_as_patches_are_a_collapse():
    pair = [{"step": 1, "embedding_std": 0.5, "positive_cosine": 0.9, "negative_cosine": 0.899}]
    message = "collapsed: negative_cosine is 0.899, positive_cosine is 0.9 at step 1 .*as alike as"
    with pytest.raises(ValueError, match=message):
        Alarm(SETTINGS, 0.1).look(pair * 3, 0.6)
    for healthy in (0.6, 0.93):  # the second: nothing is learned yet
        Alarm(SETTINGS, 0.1).look([*pair * 2, {**pair[0], "negative_cosine": healthy}], 0.6)


def test_says_once_that_a_collapse_cannot_be_seen(caplog):
    alarm = Alarm(SETTINGS, 0.1)
    for progress in (0.2, 0.9):
        alarm.look([{"step": 1, "loss": 3.0, "teacher_entropy": 0.5}] * 3, progress)
    assert caplog.text.count("does not show whether embeddings collapse: raise pretrain.batch") == 1


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
