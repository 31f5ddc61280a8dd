"""Checkpoints: whole, few, of this run and no other; signals wait for one."""

import dataclasses
import errno
import logging
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.common import checkpoint
from tests.stages.runs import ALONE

MADE = {"run": "1f", "code": "ab", "params": {"seed": 3, "pretrain": {"batch": 5, "scale": (0, 1)}}}


def saved(folder: Path, *steps: int) -> nn.Linear:
    """The part whose state lies in `folder`; a file for each of `steps`."""
    part = nn.Linear(2, 3)
    for step in steps:
        checkpoint.save(folder, step, {"part": part}, MADE, 2)
    return part


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def resumed(folder: Path, made=MADE) -> tuple[int, nn.Linear]:
    other = nn.Linear(2, 3)
    return checkpoint.resume(folder, {"part": other}, made, ALONE), other


def test_keeps_the_newest_and_sweeps_old_halves(tmp_path):
    part = saved(tmp_path, 9, 10, 11)
    fresh, stale = tmp_path / ".step-1.pt.1.tmp", tmp_path / ".step-2.pt.1.tmp"
    for file in (fresh, stale):
        file.touch()
    os.utime(stale, (0, 0))
    step, other = resumed(tmp_path)
    assert step == 11
    assert torch.equal(part.weight, other.weight)
    assert names(tmp_path) == [fresh.name, "step-000000010.pt", "step-000000011.pt"]
    assert resumed(tmp_path / "empty")[0] == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "another file"])
def test_damaged_newest_gives_way_to_the_one_before_with_a_warning(tmp_path, caplog, damage):
    saved(tmp_path, 4)
    part = saved(tmp_path, 5)
    newest, before = tmp_path / "step-000000005.pt", tmp_path / "step-000000004.pt"
    whole = newest.read_bytes()
    at = whole.index(part.weight.detach().numpy().tobytes()) + 9  # within the weights
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "emptied": b"",
        "another file": b"x" * 99,
    }
    newest.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        step, _ = resumed(tmp_path)
    assert step == 4
    assert f"{newest} is damaged" in caplog.text
    assert "no whole checkpoint is left" not in caplog.text
    assert names(tmp_path) == [before.name]
    before.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path)[0] == 0
    assert f"no whole checkpoint is left in {tmp_path}: starting at step 0" in caplog.text


def test_after_damage_to_all_of_them_new_ones_stay(tmp_path):
    for step in (40, 60):
        (tmp_path / f"step-{step:09d}.pt").write_bytes(b"x")
    assert resumed(tmp_path)[0] == 0
    part = saved(tmp_path, 20)
    step, other = resumed(tmp_path)
    assert step == 20
    assert torch.equal(part.weight, other.weight)


def test_what_was_just_written_stays_beside_files_of_later_steps(tmp_path):
    saved(tmp_path, 40, 60, 20)
    assert "step-000000020.pt" in names(tmp_path)


def test_a_damaged_end_is_told_and_removed(tmp_path, caplog):
    part = {"part": nn.Linear(2, 3)}
    checkpoint.finish(tmp_path, 6, part, MADE)
    end = tmp_path / checkpoint.FINISHED
    end.write_bytes(end.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert not checkpoint.finished(tmp_path, part, MADE)
    assert f"{end} is damaged" in caplog.text
    assert f"no whole checkpoint is left in {tmp_path}: starting at step 0" in caplog.text
    assert names(tmp_path) == []


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    saved(tmp_path, 4)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", refuse)  # root may read all files
    with pytest.raises(PermissionError):
        resumed(tmp_path)
    assert names(tmp_path) == ["step-000000004.pt"]


def test_no_damage_at_all_ends_in_another_error(tmp_path):
    saved(tmp_path, 4)
    file = tmp_path / "step-000000004.pt"
    whole = file.read_bytes()
    rng = random.Random(5)
    for _ in range(200):
        bad = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(9):
            if bad:  # mostly in the lists of names and places at the end
                bad[-rng.randrange(1, min(len(bad), 900) + 1)] = rng.randrange(256)
        file.write_bytes(bad)
        assert resumed(tmp_path)[0] in (0, 4)


def test_state_of_another_run_is_refused_with_what_differs(tmp_path):
    saved(tmp_path, 5)
    other = {**MADE, "code": "cd", "params": {"seed": 3, "pretrain": {"batch": 7, "scale": [0, 1]}}}
    message = (
        r"step-000000005\.pt is of another run \(code: ab there, cd here; "
        r"params\.pretrain\.batch: 5 there, 7 here\): move it"
    )
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path, other)
    part = {"part": nn.Linear(2, 3)}
    checkpoint.finish(tmp_path, 6, part, MADE)
    with pytest.raises(ValueError, match=r"finished\.pt is of another run"):
        checkpoint.finished(tmp_path, part, other)


def test_finished_run_keeps_one_file_of_what_is_wanted(tmp_path):
    part, wanted, other = saved(tmp_path, 4, 5), nn.Linear(5, 7), nn.Linear(5, 7)
    assert not checkpoint.finished(tmp_path, {"wanted": other}, MADE)
    checkpoint.finish(tmp_path, 6, {"wanted": wanted}, MADE)
    assert names(tmp_path) == ["finished.pt"]
    assert checkpoint.finished(tmp_path, {"wanted": other}, MADE)
    assert torch.equal(wanted.weight, other.weight)
    assert part.weight.shape == (3, 2)


def test_what_a_kill_at_the_end_left_is_dropped_later(tmp_path):
    saved(tmp_path, 4, 5)
    step = tmp_path / "step-000000005.pt"
    before = step.read_bytes()
    part = {"part": nn.Linear(2, 3)}
    checkpoint.finish(tmp_path, 6, part, MADE)
    step.write_bytes(before)
    assert checkpoint.finished(tmp_path, part, MADE)
    assert names(tmp_path) == ["finished.pt"]


def test_second_signal_is_not_held_back():
    with checkpoint.interruptible(ALONE) as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_with_several_processes_torchruns_own_signal_changes_nothing():
    with checkpoint.interruptible(dataclasses.replace(ALONE, count=2)) as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT] * 2
