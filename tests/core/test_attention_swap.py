"""with_sr_attention: which attentions it replaces, what it keeps, and the grid that models tell."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from cytossl_core.attention import SRAttention, with_sr_attention
from tests.core.test_attention_layer import filled


def swapped(topk=4, irpe="qkv", **settings):
    torch.manual_seed(0)
    settings = {"img_size": 64, "depth": 2, "num_classes": 3} | settings
    model = timm.create_model("vit_tiny_patch16_224", **settings).eval()
    return filled(with_sr_attention(model, topk=topk, irpe=irpe))


def features(model, grid=None, seed=5):
    """Of one image; with a grid, of layers that take it instead of what the model tells."""
    height, width = grid or (4, 4)
    torch.manual_seed(seed)
    image = torch.randn(1, 3, 16 * height, 16 * width)
    return model.forward_features(image)


def with_grid_by_hand(model, grid):
    """The same with layers that ask nobody but their .grid."""
    same = copy.deepcopy(model)
    for block in same.blocks:
        block.attn.told, block.attn.grid = None, grid
    return same


def test_images_of_one_token_count_and_two_shapes_have_their_own_grids():
    model = swapped(dynamic_img_size=True)
    for grid in [(2, 8), (4, 4), (8, 2), (2, 8)]:
        expected = features(with_grid_by_hand(model, grid), grid)
        assert torch.equal(features(model, grid), expected)
    assert not torch.allclose(features(with_grid_by_hand(model, (4, 4)), (2, 8)), expected)


@pytest.mark.parametrize(("before", "after"), [((4, 4), (2, 8)), ((2, 6), (6, 2))])
def test_a_model_set_to_another_input_size_tells_its_new_grid(before, after):
    model = swapped(img_size=tuple(16 * side for side in before))
    model.set_input_size(img_size=tuple(16 * side for side in after))
    expected = features(with_grid_by_hand(model, after), after)
    assert torch.equal(features(model, after), expected)


def test_copies_of_a_model_are_told_their_own_grid():
    model = swapped(dynamic_img_size=True)
    expected = features(model, (2, 8))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        features(model, (4, 4))
        assert torch.equal(features(same, (2, 8)), expected)
        assert model.blocks[0].attn.told.latest == (4, 4)
    assert "told" not in "".join(model.state_dict())


def test_checkpointed_gradients_of_several_grids_are_those_of_none():
    """Backward runs the blocks of the first image again after the second was told."""
    grids = [(2, 8), (3, 3)]
    gradients = []
    for checkpointed in (False, True):
        model = swapped(dynamic_img_size=True).train()
        model.set_grad_checkpointing(checkpointed)
        loss = sum(features(model, grid).square().sum() for grid in grids)
        gradients.append(torch.autograd.grad(loss, list(model.blocks.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_rejects_checkpointed_gradients_of_two_grids_of_one_token_count():
    model = swapped(dynamic_img_size=True).train()
    model.set_grad_checkpointing()
    loss = features(model, (2, 8)).sum() + features(model, (4, 4)).sum()
    with pytest.raises(ValueError, match="several shapes with 16 tokens, and checkpointed gradi"):
        loss.backward()


def test_an_evaluation_before_does_not_confuse_checkpointed_gradients():
    model = swapped(dynamic_img_size=True).train()
    model.set_grad_checkpointing()
    with torch.no_grad():
        features(model, (2, 8))
    features(model, (4, 4)).sum().backward()


def test_rejects_a_grid_by_hand_that_the_images_have_not():
    model = swapped()
    model.blocks[1].attn.grid = (2, 8)
    with pytest.raises(ValueError, match="SRAttention.grid is 2 x 8, but the images make 4 x 4"):
        features(model)


def test_rejects_models_that_leave_patches_out():
    with pytest.raises(ValueError, match="VisionTransformer has patch_drop_rate 0.75, and a token"):
        swapped(patch_drop_rate=0.75)
    swapped(patch_drop_rate=0.75, irpe="none")
    model = swapped(img_size=128).train()
    model.patch_drop = timm.layers.PatchDropout(0.75)  # 64 tokens become 16, again a square
    with pytest.raises(ValueError, match="16 tokens after 1 special tokens, not the 8 x 8 of the"):
        features(model, (8, 8))


def test_rejects_naflex_whose_tokens_have_no_grid():
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=3)
    with pytest.raises(ValueError, match="NaFlexVit has no .patch_embed with dynamic_feat_size"):
        with_sr_attention(model)


class Doubled(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


class Same(nn.Module):
    """Timm's numbers by other code."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        weights = (query @ key.mT * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class AcrossChannels(Same):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        weights = (query.transpose(1, 2).mT @ key.transpose(1, 2) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value.transpose(1, 2).mT).mT.transpose(1, 2).flatten(2))


class WithoutScale(Same):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.true_scale, self.scale = 1.0, self.scale

    def forward(self, x):
        told, self.scale = self.scale, self.true_scale
        out = super().forward(x)
        self.scale = told
        return out


def model_of(attention):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    model.blocks[1].attn = attention
    return model


@pytest.mark.parametrize("kind", [Doubled, AcrossChannels, WithoutScale])
def test_rejects_an_attention_of_other_numbers_and_changes_nothing(kind):
    model = model_of(kind(192, 3))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{kind.__name__} gives other numbers than timm's Atten"):
        with_sr_attention(model)
    assert [type(module) for module in model.modules()] == before
    assert not model.patch_embed._forward_pre_hooks


def test_rejects_an_attention_whose_forward_was_exchanged():
    attention = Attention(192, 3)
    attention.forward = lambda x: 2 * x
    with pytest.raises(ValueError, match="Attention gives other numbers"):
        with_sr_attention(model_of(attention))


def test_takes_an_attention_of_the_same_numbers():
    model = with_sr_attention(model_of(Same(192, 3)))
    assert isinstance(model.blocks[1].attn, SRAttention)


@pytest.mark.parametrize("name", ["davit_tiny", "nest_tiny"])
def test_rejects_timms_attentions_over_windows_and_channels(name):
    model = timm.create_model(name)
    for irpe in ("none", "qkv"):
        with pytest.raises(ValueError):
            with_sr_attention(model, irpe=irpe, special_tokens=0)


def test_a_second_swap_keeps_learned_tables():
    model = swapped()
    tables = {name: t.clone() for name, t in model.named_parameters() if "table_" in name}
    with_sr_attention(model, topk=7)
    assert model.blocks[1].attn.topk == 7
    assert len(model.patch_embed._forward_pre_hooks) == 1
    for name, table in tables.items():
        assert torch.equal(model.get_parameter(name), table)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"irpe": "k"}, "table_q is learned, .* and would be lost: irpe 'k' has none"),
        ({"shared_head": False}, r"\(1, 50, 64\) .* irpe 'qkv' has \(3, 50, 64\)"),
        ({"ratio": 1.8}, "buckets of ratio 1.9, and would be lost: .* ratio 1.8"),
    ],
)
def test_rejects_a_second_swap_that_would_lose_learned_tables(settings, found):
    with pytest.raises(ValueError, match=found):
        with_sr_attention(swapped(), **settings)


def test_a_second_swap_may_exchange_tables_that_learned_nothing():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    with_sr_attention(with_sr_attention(model, irpe="qk"), irpe="bias")
    assert model.blocks[0].attn.table_k is None


def test_scale_training_mode_and_norms_are_those_of_the_attention_before():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, qk_norm=True)
    model.blocks[0].attn.scale, norm = 0.25, model.blocks[0].attn.q_norm
    model.blocks[1].attn.eval()
    with_sr_attention(model, topk=None)
    first, second = (block.attn for block in model.blocks)
    assert (first.scale, first.training, second.training) == (0.25, True, False)
    assert first.q_norm is norm


def test_tables_are_spared_weight_decay_as_timms_embeddings_are():
    model = copy.deepcopy(swapped(irpe="k"))
    tables = {f"blocks.{i}.attn.table_k" for i in range(2)}
    assert model.no_weight_decay() >= tables | {"pos_embed", "cls_token"}


def test_a_model_without_memory_is_swapped_and_called():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
        with_sr_attention(model)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 3)
