"""SimCLR, MoCo v3 and BYOL: what they compute, what follows, what is kept; and masked DINO."""

import copy
import math

import pytest
import torch
from torch import nn

from cytossl_core.losses import koleo_loss
from stages.common.chance import keys_of
from stages.methods._masked import Masking, masks
from tests.definitions import contrastive as definition
from tests.stages.small_methods import BATCH, KEYS, METHODS, PX, build, optimizer_of, step, views


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_gets_a_gradient_and_no_other(name):
    method = build(name)
    adam = optimizer_of(method)
    step(method, adam, 0.0, 0)  # tables at zero hide the gradient of what meets them
    method(views(method, 1), 0.5, KEYS).backward()
    for label, value in method.named_parameters():
        assert (value.grad is not None) == value.requires_grad, label
        assert value.grad is None or value.grad.isfinite().all(), label
    flat = [n for n, v in method.named_parameters() if v.requires_grad and not v.grad.any()]
    # a bias before a batch norm, and with DINO the weight of what softmax ignores, learn nothing
    assert not [label for label in flat if "bias" not in label], flat


@pytest.mark.parametrize("name", METHODS)
def test_learns_to_tell_a_fixed_batch_apart(name):
    method = build(name)
    adam = optimizer_of(method)
    losses = [step(method, adam, 0.2, 0) for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_in_the_middle_changes_no_bit(name):
    method = build(name)
    adam = optimizer_of(method)
    step(method, adam, 0.0, 0)
    other, other_adam = build(name), None
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    other_adam = optimizer_of(other)
    other_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    for at in (1, 2):
        assert step(method, adam, at / 3, at) == step(other, other_adam, at / 3, at)
    for value, twin in zip(method.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(value, twin)


@pytest.mark.parametrize(("name", "start"), [("mocov3", 0.99), ("byol", 0.996)])
def test_the_follower_is_the_average_that_a_loop_gives(name, start):
    method = build(name)
    network, follower = {
        "mocov3": lambda: (method.query, method.key),
        "byol": lambda: (method.online, method.target),
    }[name]()
    wanted = [value.clone() for value in follower.parameters()]
    for progress in (0.0, 0.25, 0.5):
        keep = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
        with torch.no_grad():
            for at, value in enumerate(network.parameters()):
                if value.requires_grad:  # no step moves what is frozen
                    value.add_(torch.randn(value.shape))
                wanted[at] = keep * wanted[at] + (1 - keep) * value
        method.after_step(progress)
    for value, expected in zip(follower.parameters(), wanted, strict=True):
        torch.testing.assert_close(value, expected)
        assert not value.requires_grad


def test_simclr_compares_projections_of_the_encoder():
    method = build("simclr")
    one, two = views(method)
    rows = method.projector(method.encoder(torch.cat([one, two])))
    expected = definition.nt_xent(*rows.chunk(2), method.params.temperature)
    torch.testing.assert_close(method([one, two], 0.0, KEYS), expected)


def test_mocov3_compares_each_view_with_the_other_ones_keys():
    method = build("mocov3")
    seen = views(method)
    query = [method.predictor(method.query(view)) for view in seen]
    key = [method.key(view) for view in seen]
    expected = definition.mocov3(*query, *key, method.params.temperature)
    torch.testing.assert_close(method(seen, 0.0, KEYS), expected)


def test_byol_predicts_the_other_view():
    method = build("byol")
    seen = views(method)
    predicted = [method.predictor(method.online(view)) for view in seen]
    target = [method.target(view) for view in seen]
    expected = definition.byol(predicted[0], target[1]) + definition.byol(predicted[1], target[0])
    torch.testing.assert_close(method(seen, 0.0, KEYS), expected)


def test_mocov3_leaves_the_tokens_as_drawn_only_when_asked():
    frozen, free = build("mocov3"), build("mocov3", freeze_tokens=False)
    assert not any(value.requires_grad for value in frozen.encoder.patch_embed.parameters())
    assert all(value.requires_grad for value in free.encoder.patch_embed.parameters())


@pytest.mark.parametrize("name", ["mocov3", "byol"])
def test_the_follower_drops_no_paths_but_normalises_by_the_batch(name):
    method = build(name, drop_path=0.9)
    follower = method.key if name == "mocov3" else method.target
    image = views(method)[0]
    assert torch.equal(follower(image), follower(image))
    assert all(m.training for m in follower.modules() if isinstance(m, nn.BatchNorm1d))


def test_the_follower_shares_what_is_frozen_and_nothing_else():
    method = build("mocov3")
    assert method.key[0].patch_embed.proj.weight is method.query[0].patch_embed.proj.weight
    shared = {id(value) for value in method.key.parameters()} & {
        id(value) for value in method.query.parameters()
    }
    assert len(shared) == len(list(method.query[0].patch_embed.parameters()))


@pytest.mark.parametrize("name", ["simclr", "mocov3", "byol"])
def test_both_views_share_one_range_of_scales(name):
    first, second = build(name).view_policies
    assert first.views == second.views == 1 and first.scale == second.scale == (0.5, 1.0)
    assert first.crop_px == second.crop_px == PX


@pytest.mark.parametrize("name", METHODS)
def test_monitor_tells_health_from_collapse(name):
    method = build(name)
    seen = views(method)
    method(seen, 0.3, KEYS)
    healthy = method.monitor(0.3)
    assert healthy["embedding_std"] > 0.05 and all(map(math.isfinite, healthy.values()))
    one = {view.shape: view[:1].expand_as(view) for view in seen}
    method([one[view.shape] for view in seen], 0.4, KEYS[:1].expand(BATCH))
    assert method.monitor(0.4)["embedding_std"] == pytest.approx(0, abs=1e-3)


def test_masked_dino_adds_tokens_and_koleo_to_the_same_loss():
    method, plain = build("dino with tokens"), build("dino", koleo_weight=0.1)
    plain.load_state_dict(method.state_dict(), strict=False)
    empty = Masking(0.7, 0.0, (0.1, 0.5))  # no view is masked: what is left is DINO and KoLeo
    object.__setattr__(method.params, "ibot", empty)
    seen = views(method)
    got = method(seen, 0.3, KEYS)
    torch.testing.assert_close(got, plain(seen, 0.3, KEYS))
    without = build("dino")
    without.load_state_dict(plain.state_dict())
    spread = sum(koleo_loss(plain.student.encoder(view)) for view in seen[:2])
    torch.testing.assert_close(got, without(seen, 0.3, KEYS) + 0.1 * spread)


def test_the_student_cannot_see_what_is_masked():
    method = build("dino with tokens")
    masked = masks(KEYS, 0, 4, method.params.ibot)
    image = views(method)[0]
    side = masked.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(side, torch.randn_like(image), image)
    with torch.no_grad():
        one, two = (method.student.with_tokens([x], masked, True)[2] for x in (image, changed))
        other = method.teacher.with_tokens([changed], masked, False)[2]
        assert torch.equal(one, two)
        assert not torch.equal(method.teacher.with_tokens([image], masked, False)[2], other)


def test_masks_depend_on_the_key_alone_and_cover_their_share():
    masking = Masking(1.0, 0.5, (0.2, 0.4))
    keys = keys_of(1, 0, torch.arange(400))
    found = masks(keys, 0, 14, masking)
    assert torch.equal(found[[7, 3]], masks(keys[[7, 3]], 0, 14, masking))
    assert not torch.equal(found, masks(keys, 1, 14, masking))
    share = found.double().mean(1)
    assert 0.4 < (share > 0).double().mean() < 0.6
    covered = share[share > 0]
    assert covered.max() <= 0.41 and 0.2 < covered.mean() < 0.4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("simclr", {"temperature": 0.0}, "pretrain.simclr.temperature is 0.0: it must be 1e-06"),
        ("byol", {"momentum": 1.5}, "pretrain.byol.momentum is 1.5: it must be from 0 to 1"),
        ("mocov3", {"hidden_dim": 0}, "pretrain.mocov3.hidden_dim is 0: it must be 1 or more"),
        ("dino", {"prototypes": 0}, "pretrain.dino.prototypes is 0: it must be 2 or more"),
        ("dino", {"koleo_weight": -1.0}, "pretrain.dino.koleo_weight is -1.0"),
    ],
)
def test_rejects(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


@pytest.mark.parametrize("share", [(0.0, 0.5), (0.5, 0.1), (0.5, 1.0)])
def test_rejects_masks_of_all_or_nothing(share):
    with pytest.raises(ValueError, match="pretrain.dino.ibot is"):
        Masking(1.0, 0.5, share)


@pytest.mark.parametrize("name", ["simclr", "mocov3", "byol"])
def test_rejects_a_pass_of_one_patch(name):
    method = build(name)
    alone = [view[:1] for view in views(method)]
    with pytest.raises(ValueError, match=f"pretrain.method {name} compares .* has 1 in one"):
        method(alone, 0.0, KEYS[:1])


def test_dino_says_nothing_of_how_patches_differ_where_a_pass_holds_one():
    method = build("dino")
    method([view[:1] for view in views(method)], 0.3, KEYS[:1])
    found = method.monitor(0.3)
    assert "teacher_entropy" in found
    assert not {"embedding_std", "prototypes_entropy"} & found.keys()


def test_prototypes_of_both_heads_stay_as_drawn_at_first():
    method = build("dino with tokens")
    method(views(method), 0.0, KEYS).backward()
    method.after_backward(0.0)
    student = method.student
    assert student.head.prototypes.weight.grad is None
    assert student.token_head.prototypes.weight.grad is None
