"""The journal: means of the last epoch that neither rows nor a resume change."""

import math

import pytest

from stages.common.journal import Journal

LOSSES = [5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5]
NORMS = [1.0, math.inf, 2.0, 3.0, math.inf, 5.0, 4.0]


def written(every: int, stop: int = 7) -> Journal:
    journal = Journal(None, every, 7, epoch=3)
    return noted(journal, range(stop))


def noted(journal: Journal, steps: range) -> Journal:
    for at in steps:
        journal.note(LOSSES[at], NORMS[at], 2)
        if journal.due(at + 1):
            journal.write(at + 1, {"momentum": at / 7})
    return journal


@pytest.mark.parametrize("every", [1, 2, 5, 99])
def test_summary_is_of_the_last_epoch_wherever_the_rows_are(every):
    found = written(every).summary()
    assert found.pop("loss") == pytest.approx(1.0)
    assert found == {"gradient_norm": 4.5, "skipped_steps": 1, "momentum": 6 / 7}


def test_a_resume_changes_nothing_of_it():
    other = Journal(None, 2, 7, epoch=3)
    other.load_state_dict(written(2, stop=5).state_dict())
    assert noted(other, range(5, 7)).summary() == written(2).summary()
