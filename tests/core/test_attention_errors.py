"""What SR-attention refuses, and in which words."""

import pytest
import timm
import torch
from jaxtyping import config
from torch import nn

from cytossl_core.attention import SRAttention, irpe_buckets, sr_attention, with_sr_attention


@pytest.fixture(autouse=True)
def unchecked():
    """Without shape checks of signatures: users do not have them, so the errors must be ours."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def call(token=10, **changes):
    query = torch.zeros(2, 3, token, 5)
    arguments = {"query": query, "key": query, "value": query, "topk": 4} | changes
    return sr_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk is 0: it must be a whole number of 1 or more, or None"),
        ({"topk": 2.5}, "topk is 2.5: it must be a whole number"),
        ({"topk": True}, "topk is True: it must be a whole number"),
        ({"bias": torch.zeros(1, 1, 1, 10).double()}, "bias is torch.float64 and query torch.flo"),
        ({"value": torch.zeros(2, 3, 10, 5, device="meta")}, "query, key and value are on cpu, me"),
        ({"key": torch.zeros(2, 3, 11, 5)}, r"shapes \(2, 3, 10, 5\), \(2, 3, 11, 5\) and"),
        ({"query": torch.zeros(2, 10, 5)}, r"must be one non-empty \[batch, head, token, head_d"),
        ({"value": torch.zeros(2, 3, 10, 5).half()}, "torch.float32 and torch.float16: they must"),
        ({"backend": "cuda"}, "backend is 'cuda': choose one of auto, reference, torch, triton"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
        ({"dropout": 0.1, "backend": "reference"}, "dropout is 0.1, which the reference has not"),
        ({"bias": torch.zeros(10, 10)}, r"bias has shape \(10, 10\): it must broadcast to"),
        ({"bias": torch.zeros(1, 1, 1, 10).bool()}, "bias is torch.bool: it must be floating"),
        ({"table_k": torch.zeros(1, 50, 5)}, "table_k came without buckets"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_rejects_integers():
    query = torch.zeros(2, 3, 10, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="torch.int64 and torch.int64: they must be the same of"):
        sr_attention(query, query, query)


def test_rejects_tables_of_another_bucket_count():
    ids, count = irpe_buckets(3, 3)
    with pytest.raises(ValueError, match="table_v has 49 buckets, but ids of a 3 x 3 grid with 1"):
        call(buckets=ids, table_k=torch.zeros(1, count, 5), table_v=torch.zeros(1, 49, 5))


def test_rejects_tables_of_unequal_bucket_counts():
    ids, count = irpe_buckets(3, 3)
    with pytest.raises(ValueError, match="bucket counts are {'table_k': 50, 'table_v': 51}: size"):
        call(buckets=ids + 0, table_k=torch.zeros(1, count, 5), table_v=torch.zeros(1, 51, 5))


def test_rejects_larger_tables_than_the_ids_of_a_grid_have():
    ids, _ = irpe_buckets(2, 4, special_tokens=2, method="euclidean", ratio=3.0)
    message = (
        r"table_k has 15 buckets, but ids of a 2 x 4 grid with 2 special tokens \(method "
        r"euclidean, ratio 3.0\) have 14: size it by irpe_buckets"
    )
    with pytest.raises(ValueError, match=message):
        call(buckets=ids, table_k=torch.zeros(1, 15, 5))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("topk", [3, 9, None])
def test_rejects_float64_beside_float32_on_every_path(backend, topk):
    ids, count = irpe_buckets(3, 3)
    arguments = {"buckets": ids, "topk": topk, "backend": backend}
    with pytest.raises(ValueError, match="table_k is torch.float64 and query torch.float32: floa"):
        call(table_k=torch.zeros(1, count, 5).double(), **arguments)
    query = torch.zeros(2, 3, 10, 5).double()
    arguments |= {"query": query, "key": query, "value": query}
    with pytest.raises(ValueError, match="table_k is torch.float32 and query torch.float64: floa"):
        call(table_k=torch.zeros(1, count, 5), **arguments)


def test_rejects_tables_of_whole_numbers_or_on_another_device():
    ids, count = irpe_buckets(3, 3)
    with pytest.raises(ValueError, match="table_q is torch.int64: it must be floating point"):
        call(buckets=ids, table_q=torch.zeros(1, count, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="table_q is on meta and query on cpu: move one"):
        call(buckets=ids, table_q=torch.zeros(1, count, 5, device="meta"))
    with pytest.raises(ValueError, match="buckets are on meta and query on cpu: give irpe_buckets"):
        call(buckets=ids.to("meta"), table_q=torch.zeros(1, count, 5))


def test_rejects_triton_where_it_cannot_run():
    with pytest.raises(ValueError, match="backend is 'triton', but .*: take 'torch' or 'auto'"):
        call(dropout=0.1, backend="triton")


def test_rejects_buckets_of_another_grid():
    ids, count = irpe_buckets(3, 4)
    with pytest.raises(ValueError, match=r"int64 \(13, 13\): for 10 tokens they must be int64 \(1"):
        call(buckets=ids, table_k=torch.zeros(1, count, 5))


def test_rejects_tables_of_another_width():
    ids, count = irpe_buckets(3, 3)
    with pytest.raises(
        ValueError, match=r"table_q has shape \(2, 50, 5\): it must be \[3 or 1, bu"
    ):
        call(buckets=ids, table_q=torch.zeros(2, count, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk is 0"),
        ({"irpe": "kv"}, "irpe is 'kv': choose one of none, k, qk, qkv, bias"),
        ({"method": "polar"}, "iRPE method is 'polar'"),
        ({"topk": 1.5}, "topk is 1.5: it must be a whole number"),
        ({"backend": "cuda"}, "backend is 'cuda': choose one of auto"),
        ({"num_heads": 0}, "num_heads is 0: it must be 1 or more"),
        ({"num_heads": -3}, "num_heads is -3: it must be 1 or more"),
        ({"attn_head_dim": 0}, "attn_head_dim is 0: it must be 1 or more"),
        ({"ratio": float("inf")}, "iRPE ratio is inf"),
        ({"num_heads": 4}, "dim is 15: it must be a multiple of num_heads, 4"),
    ],
)
def test_layer_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        SRAttention(15, **{"num_heads": 3} | changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, 15), r"tokens are \(10, 15\): they must be \[batch, token, dim\]"),
        ((1, 3, 15), "attention has 3 tokens, and 3 of them would be special: give it more"),
        ((1, 2, 15), "attention has 2 tokens, and 3 of them would be special: give it more"),
    ],
)
def test_layer_rejects_tokens_without_a_grid(shape, message):
    with pytest.raises(ValueError, match=message):
        SRAttention(15, num_heads=3, special_tokens=3)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64])
def test_layer_rejects_masks_that_are_neither_bool_nor_scores(dtype):
    mask = torch.ones(10, 10, dtype=dtype)
    with pytest.raises(ValueError, match=f"attn_mask is {dtype}.*: "):
        SRAttention(15, num_heads=3)(torch.zeros(1, 10, 15), attn_mask=mask)


def test_layer_rejects_a_mask_beside_causal():
    layer = SRAttention(15, num_heads=3)
    with pytest.raises(ValueError, match="attn_mask and is_causal are both given"):
        layer(torch.zeros(1, 10, 15), attn_mask=torch.zeros(10, 10), is_causal=True)


def test_swap_rejects_a_model_without_attention():
    with pytest.raises(ValueError, match="Sequential has no block with .attn"):
        with_sr_attention(nn.Sequential(nn.Linear(2, 2)), special_tokens=1)


def test_swap_rejects_a_model_of_unknown_special_tokens():
    with pytest.raises(ValueError, match="Sequential has no num_prefix_tokens: give special_tok"):
        with_sr_attention(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva02_tiny_patch14_224", "EvaAttention"),
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("vit_relpos_small_patch16_224", "RelPosAttention"),
    ],
)
def test_swap_rejects_an_attention_that_computes_something_else(name, part):
    model = timm.create_model(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{part} .*SRAttention cannot take its place"):
        with_sr_attention(model, special_tokens=1)
    assert [type(module) for module in model.modules()] == before
