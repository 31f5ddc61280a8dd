"""What a method tells of its health: over the passes of a step, over ranks, and of each loss."""

import dataclasses
import math

import pytest
import torch

from cytossl_core.losses import koleo_loss
from stages.methods import _health
from stages.methods._masked import Masking
from tests.stages.small_methods import BATCH, KEYS, PX, build, views


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_step_is_seen_over_its_passes_and_no_longer():
    seen = _health.Seen()
    for at in range(3):
        seen.note(0.5, 1, torch.full((2, 3), float(at)), torch.full((1, 4), float(at)))
    first, second = seen.rows()
    assert first[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert second.shape == (3, 4)
    seen.note(0.6, 1, torch.full((2, 3), 9.0), torch.full((1, 4), 9.0))
    assert seen.rows()[0].unique().tolist() == [9]


def test_passes_that_are_spare_are_let_go():
    seen = _health.Seen()
    for at in range(9):
        seen.note(0.5, 6, torch.full((6, 1), float(at)))
    assert seen.patches == 18
    assert seen.rows()[0].unique().tolist() == [6, 7, 8]
    seen.note(0.5, 99, torch.zeros(99, 1))
    assert seen.patches == 99


@pytest.mark.parametrize("name", ["dino", "simclr", "mocov3", "byol"])
def test_collapse_is_seen_whatever_the_passes(name):
    method, whole = build(name), build(name)
    seen = views(method)
    whole(seen, 0.3, KEYS)
    for rows in ([0], [1], [2, 3, 4]) if name == "dino" else ([0, 1], [2, 3, 4]):
        method([view[rows] for view in seen], 0.3, KEYS[rows])
    found, wanted = method.monitor(0.3), whole.monitor(0.3)
    assert found.keys() == wanted.keys()
    # batch norms see a pass, the encoder a patch
    assert found["embedding_std"] == pytest.approx(wanted["embedding_std"], rel=1e-4)
    if name == "dino":
        assert found == pytest.approx(wanted, rel=1e-4)


def test_each_loss_of_masked_dino_is_told_apart():
    method = build("dino with tokens")
    seen = views(method)
    total = method(seen, 0.3, KEYS).item()
    found = method.monitor(0.3)
    assert 0 < found["token_loss"] < 2 * math.log(13)
    assert 0 < found["token_entropy"] <= 1
    with torch.no_grad():
        masked = method._masks(seen, KEYS)
        logits, embedding, _ = method.student.with_tokens(seen, masked, True)
        wanted = method.teacher.with_tokens(seen[:2], masked, False)[0]
        dino = method.loss(logits, wanted, method.teacher_temperature(0.3), hold=True).item()
        koleo = sum(koleo_loss(view).item() for view in embedding[: 2 * BATCH].chunk(2))
    assert found["koleo"] == pytest.approx(koleo, rel=1e-4)
    assert total == pytest.approx(dino + 0.7 * found["token_loss"] + 0.1 * koleo, rel=1e-4)
    plain = build("dino")
    plain(seen, 0.3, KEYS)
    assert not {"koleo", "token_loss", "token_entropy"} & plain.monitor(0.3).keys()


def test_tokens_are_masked_where_local_views_are_as_large_as_global_ones():
    method = build("dino with tokens", local_px=PX)
    plain = build("dino", local_px=PX, koleo_weight=0.1)
    plain.load_state_dict(method.state_dict(), strict=False)
    seen = views(method)
    assert math.isfinite(method(seen, 0.3, KEYS).item())
    none = dataclasses.replace(method.params, ibot=Masking(0.7, 0.0, (0.1, 0.5)))
    method.params = none  # no view is masked: what is left is DINO and KoLeo
    torch.testing.assert_close(method(seen, 0.3, KEYS), plain(seen, 0.3, KEYS))
    assert "token_entropy" not in method.monitor(0.3)
