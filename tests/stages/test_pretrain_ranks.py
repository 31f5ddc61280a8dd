"""Several processes under torchrun: the numbers of one, one writer, and stops that all obey."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from stages.common.ranks import Ranks
from tests.stages.runs import (
    assert_close,
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

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SETTINGS = changed(batch=6, drop_path=0.3, epochs=12)  # 3 patches for each process; 36 steps
MADE = Path("data/pretrain")


def ended(child: subprocess.Popen, code: int) -> str:
    """What `child` wrote until it ended with `code`."""
    _, errors = child.communicate(timeout=120)
    assert child.returncode == code, errors
    return errors


def processes(child: subprocess.Popen) -> dict[str, int]:
    """Process ids of the ranks that torchrun started."""
    pids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_text() for pid in pids}
    ranks = {pid: re.search(r"\0RANK=(\d+)\0", text) for pid, text in environments.items()}
    return {found[1]: int(pid) for pid, found in ranks.items() if found}


def test_ranks_share_a_batch_evenly():
    rows = list(range(24))
    group = [Ranks(rank, 3, torch.device("cpu")) for rank in range(3)]
    shares = [ranks.share(rows, 2) for ranks in group]
    assert shares[1] == [[1, 4, 7, 10], [13, 16, 19, 22]]
    for at in range(2):  # what a pass holds does not depend on the number of ranks
        held = sorted(row for share in shares for row in share[at])
        assert held == Ranks(0, 1, torch.device("cpu")).share(rows, 2)[at]


@pytest.mark.slow
def test_stopped_and_killed_processes_end_with_the_bits_of_unbroken_ones_and_the_numbers_of_one(
    source,
):
    write_params(Path(), SETTINGS)
    unbroken = ended(start(*TORCHRUN), 0)
    assert unbroken.count(" 0/36 ") == 1  # one process shows how far it is
    wanted = weights(MADE)
    forget_checkpoints()
    assert_close(train(source, SETTINGS, target="alone"), MADE)
    forget_checkpoints()

    child = start(*TORCHRUN)
    wait_for_checkpoint(child)
    os.kill(processes(child)["1"], signal.SIGTERM)  # one of them; both must end
    assert "stopped by SIGTERM after step" in ended(child, 1)
    assert len(checkpoints()) == 2

    child = start(*TORCHRUN)
    wait_for_checkpoint(child)
    for pid in (*processes(child).values(), child.pid):
        os.kill(pid, signal.SIGKILL)
    assert "going on after step" in ended(child, -signal.SIGKILL)

    ended(start(*TORCHRUN), 0)
    assert weights(MADE) == wanted
    assert [step for step, _ in curve(MADE, "loss")] == list(range(2, 37, 2))
