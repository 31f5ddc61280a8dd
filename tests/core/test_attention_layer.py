"""SRAttention against timm's Attention, and in the settings where it must work."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from cytossl_core.attention import SRAttention, irpe_buckets, sr_attention, with_sr_attention
from cytossl_core.attention.irpe import cross_table

ROOT = Path(__file__).resolve().parents[2]
VITS = [
    ("vit_tiny_patch16_224", {"img_size": 64}),
    ("vit_small_patch16_224", {"img_size": 64, "depth": 2}),
    ("vit_base_patch16_224", {"img_size": 64, "depth": 2, "qk_norm": True}),
    ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 2, "init_values": 1.0}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "init_values": 1.0}),
    # Prov-GigaPath's ViT-g, small: SwiGLU, LayerScale, no bias left out
    ("vit_giant_patch14_dinov2", {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2}),
]


def vit(name, **settings):
    settings = {"num_classes": 7} | settings
    if "giant" in name:
        settings |= {"num_heads": 3, "init_values": 1.0}
    torch.manual_seed(0)
    return timm.create_model(name, **settings).eval()


def filled(module, scale=0.5):
    """The same with tables drawn, so that they matter."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "table_" in name:
            nn.init.normal_(parameter, std=scale)
    return module


@pytest.mark.parametrize(("name", "settings"), VITS)
def test_dense_with_zero_tables_is_timms_model(name, settings):
    model = vit(name, **settings)
    images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    plain = model(images)
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    random = torch.get_rng_state()
    assert with_sr_attention(model, topk=None, irpe="qkv") is model
    assert torch.equal(torch.get_rng_state(), random)
    assert all(isinstance(block.attn, SRAttention) for block in model.blocks)
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    for key, weight in weights.items():
        assert torch.equal(model.state_dict()[key], weight)
    with_sr_attention(model, topk=3, irpe="qkv")
    assert (model(images) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"qkv_bias": True},
        {"qkv_bias": False, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        {"qkv_bias": True, "attn_head_dim": 11, "dim_out": 13, "proj_bias": False, "gated": True},
    ],
)
def test_layer_is_timms_attention_with_the_same_arguments(settings):
    theirs = Attention(30, num_heads=3, **settings)
    ours = SRAttention(30, num_heads=3, topk=None, **settings)
    state = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert state.unexpected_keys == [] and state.missing_keys == ["table_q", "table_k", "table_v"]
    x = torch.randn(2, 17, 30)
    torch.testing.assert_close(ours(x), theirs(x))
    padded = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    padded[..., 12:] = False
    torch.testing.assert_close(ours(x, attn_mask=padded), theirs(x, attn_mask=padded))
    added = torch.randn(17, 17)
    torch.testing.assert_close(ours(x, attn_mask=added), theirs(x, attn_mask=added))
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True))


def test_layer_computes_the_equations():
    layer = filled(SRAttention(15, num_heads=3, topk=4, shared_head=False))
    x = torch.randn(2, 10, 15)
    qkv = layer.qkv(x).view(2, 10, 3, 3, 5).permute(2, 0, 3, 1, 4)
    tables = {f"table_{name}": getattr(layer, f"table_{name}") for name in "qkv"}
    ids = irpe_buckets(3, 3)[0]
    out = sr_attention(*qkv, topk=4, buckets=ids, **tables, backend="reference")
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).reshape(2, 10, 15)))


@pytest.mark.parametrize("irpe", ["none", "k", "qk", "qkv", "bias"])
@pytest.mark.parametrize("method", ["product", "cross", "euclidean"])
def test_every_parameter_learns(irpe, method):
    layer = filled(SRAttention(15, num_heads=3, topk=4, irpe=irpe, method=method))
    layer(torch.randn(2, 10, 15)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_bias_mode_adds_one_number_per_bucket_to_the_scores():
    layer = filled(SRAttention(15, num_heads=3, topk=4, irpe="bias", shared_head=False))
    x = torch.randn(2, 10, 15)
    qkv = layer.qkv(x).view(2, 10, 3, 3, 5).permute(2, 0, 3, 1, 4)
    bias = torch.stack([table[irpe_buckets(3, 3)[0], 0] for table in layer.table_bias])
    out = sr_attention(*qkv, topk=4, bias=bias[None], backend="reference")
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).reshape(2, 10, 15)))


@pytest.mark.parametrize("irpe", ["bias", "qkv"])
def test_a_removed_key_is_as_if_it_were_not_there(irpe):
    """Also where it has by far the largest score: -inf, and no large number."""
    layer = filled(SRAttention(15, num_heads=3, topk=4, irpe=irpe))
    x = torch.randn(2, 10, 15)
    x[:, 9] *= 1e4
    query, key, value = layer.qkv(x).view(2, 10, 3, 3, 5).permute(2, 0, 3, 1, 4)
    removed = torch.zeros(2, 1, 1, 10)
    removed[..., 9] = -torch.inf
    tables = {f"table_{name}": getattr(layer, f"table_{name}") for name in "qkv"}
    ids, bias = irpe_buckets(3, 3)[0], removed
    if irpe == "bias":
        bias, ids = removed + layer.table_bias[:, ids, 0], None
    out = sr_attention(
        query, key, value, topk=4, bias=bias, buckets=ids, **tables, backend="reference"
    )
    expected = layer.proj(out.transpose(1, 2).reshape(2, 10, 15))
    found = layer(x, attn_mask=removed == 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer(x, attn_mask=removed), expected)
    grad = torch.autograd.grad(found[:, :9].sum(), layer.qkv.weight)[0]
    assert grad.isfinite().all()
    x[:, 9] = torch.randn(2, 15)
    assert torch.equal(layer(x, attn_mask=removed == 0)[:, :9], found[:, :9])


def test_cross_uses_the_sum_of_its_two_tables():
    layer = filled(SRAttention(15, num_heads=3, topk=4, irpe="k", method="cross"))
    same = SRAttention(15, num_heads=3, topk=4, irpe="k")
    state = layer.state_dict()
    state["table_k"] = cross_table(layer.table_k, 1).detach()
    same.load_state_dict(state)
    x = torch.randn(2, 10, 15)
    torch.testing.assert_close(layer(x), same(x))


def test_attention_weights_are_zero_outside_the_kept_and_sum_to_one():
    layer = filled(SRAttention(15, num_heads=3, topk=4))
    weights = layer.attention_weights(torch.randn(2, 10, 15))
    assert torch.equal((weights > 0).sum(dim=-1), torch.full((2, 3, 10), 4))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 10))


def test_attention_weights_are_those_of_the_call():
    layer = filled(SRAttention(15, num_heads=3, topk=4, irpe="qk"))
    x = torch.randn(2, 10, 15)
    value = layer.qkv(x).view(2, 10, 3, 3, 5)[:, :, 2].transpose(1, 2)
    out = (layer.attention_weights(x) @ value).transpose(1, 2).reshape(2, 10, 15)
    torch.testing.assert_close(layer(x), layer.proj(out))


def test_crops_of_two_sizes_share_the_tables_in_one_step():
    model = filled(with_sr_attention(vit(*VITS[0][:1], dynamic_img_size=True, depth=2)))
    table = model.blocks[0].attn.table_k
    grads = []
    for sides in [(224,), (96,), (224, 96)]:
        torch.manual_seed(5)
        images = {side: torch.randn(1, 3, side, side) for side in (224, 96)}
        loss = sum(model(images[side]).square().sum() for side in sides)
        grads.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(grads[0] + grads[1], grads[2])


def test_a_grid_that_is_not_square_is_told_to_the_layer():
    layer = filled(SRAttention(15, num_heads=3, topk=4))
    layer.grid = (2, 6)
    assert layer(torch.randn(1, 13, 15)).shape == (1, 13, 15)
    with pytest.raises(ValueError, match="9 tokens after 1 special tokens, not the 2 x 6 of .grid"):
        layer(torch.randn(1, 10, 15))
    layer.grid = None
    with pytest.raises(ValueError, match="12 tokens after 1 special tokens, not a square grid"):
        layer(torch.randn(1, 13, 15))


def test_state_survives_a_round_trip():
    layer = filled(SRAttention(15, num_heads=3, topk=4))
    x = torch.randn(2, 10, 15)
    other = SRAttention(15, num_heads=3, topk=4)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(same(x), layer(x))


def test_trains_through_timm_as_attn_layer():
    model = vit(VITS[0][0], img_size=64, depth=2, attn_layer=SRAttention)
    assert model.blocks[1].attn.topk == 16
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_dropout_drops_kept_weights_in_training_only():
    torch.manual_seed(0)
    layer = SRAttention(15, num_heads=3, topk=4, attn_drop=0.5)
    x = torch.randn(2, 10, 15)
    layer.eval()
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(500)]).mean(dim=0)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)


def test_bfloat16_autocast_is_close_to_float32():
    layer = filled(SRAttention(64, num_heads=4, topk=None))
    x = torch.randn(2, 50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=3e-2, rtol=3e-2)


class Float32Norm(nn.LayerNorm):
    """As autocast on a GPU makes every norm."""

    def forward(self, x):
        return super().forward(x.float())


def test_norms_that_return_float32_leave_the_dtype_of_the_values():
    layer = SRAttention(15, num_heads=3, topk=4, qk_norm=True, norm_layer=Float32Norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 10, 15)).dtype == torch.bfloat16


def test_repr_tells_the_selection_and_the_tables():
    assert "topk=4, irpe='qk', special_tokens=1" in repr(SRAttention(15, 3, topk=4, irpe="qk"))


def test_half_precision_weights_work():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = SRAttention(15, num_heads=3, topk=4).to(dtype)
        assert layer(torch.randn(2, 10, 15, dtype=dtype)).dtype == dtype


def test_gradient_checkpointing_changes_no_gradient():
    layer = filled(SRAttention(15, num_heads=3, topk=4))
    x = torch.randn(2, 37, 15)
    parameters = list(layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    again = checkpoint(layer, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), parameters), plain, strict=True):
        assert torch.equal(a, b)


COMPILED = """
import timm, torch
from cytossl_core.attention import with_sr_attention

model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, dynamic_img_size=True)
with_sr_attention(model.eval(), topk=4)
for name, parameter in model.named_parameters():
    if "table_" in name:
        torch.nn.init.normal_(parameter, std=0.5)
parameters = list(model.parameters())
images = torch.randn(2, 3, 64, 64)
exported = torch.export.export(model, (images,)).module()
torch.testing.assert_close(exported(images), model(images))
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
for side in (64, 96, 80):
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(compiled(images), model(images))
    found, expected = (
        torch.autograd.grad(f(images).square().sum(), parameters) for f in (compiled, model)
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
images = torch.randn(2, 3, 32, 128)  # as many tokens as 64 x 64
torch.testing.assert_close(compiled(images), model(images))
layer = model.blocks[0].attn
layer.told = None
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
for side in (6, 7, 5):
    tokens = torch.randn(2, side**2 + 1, 192)
    torch.testing.assert_close(compiled(tokens), layer(tokens))
"""


@pytest.mark.slow
def test_exports_and_compiles_whole_at_several_grids():
    """In a process of its own: pytest's shape checks wrap what a compiler must see."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _ddp_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    layer, x = ddp_layer_and_input()
    wrapped = nn.parallel.DistributedDataParallel(layer)
    wrapped(x[rank::2]).square().sum().mul(2).backward()  # DDP takes the mean over ranks
    if rank == 0:
        grads = [parameter.grad for parameter in layer.parameters()]
        torch.save(grads, Path(store.removeprefix("file://")).parent / "grads")
    torch.distributed.destroy_process_group()


def ddp_layer_and_input():
    torch.manual_seed(3)
    return filled(SRAttention(15, num_heads=3, topk=4)), torch.randn(4, 10, 15)


def test_two_ranks_under_ddp_get_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(_ddp_rank, (f"file://{tmp_path}/store",), nprocs=2)
    layer, x = ddp_layer_and_input()
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for found, wanted in zip(torch.load(tmp_path / "grads"), expected, strict=True):
        torch.testing.assert_close(found, wanted)
