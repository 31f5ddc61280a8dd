"""Which path is taken, and what must hold where torch looks on: tracing, transforms, inference."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cytossl_core.attention import (
    SRAttention,
    functional,
    inputs,
    irpe,
    irpe_buckets,
    sr_attention,
    sr_attention_backend,
)
from cytossl_core.attention.cpu import pairs_attention
from cytossl_core.attention.sparse import sparse_attention
from tests.core.test_attention_layer import ROOT

QUERY = torch.randn(2, 3, 37, 5, generator=torch.Generator().manual_seed(0))


def taken(topk=4, bias=None, dropout=0.0, query=QUERY):
    """The function that sr_attention calls."""
    tables = (None,) * 4
    x = functional._inputs(query, query, query, topk, *tables, None, bias, dropout)
    return functional._path(x, "auto")


def test_few_kept_keys_on_a_cpu_take_the_path_of_pairs():
    assert taken() is pairs_attention
    assert taken(topk=18) is pairs_attention
    assert taken(query=torch.nn.Parameter(QUERY)) is pairs_attention
    learned = torch.zeros(1, 1, 37, 37, requires_grad=True)
    for changes in ({"topk": 19}, {"topk": None}, {"dropout": 0.1}, {"bias": learned}):
        assert taken(**changes) is sparse_attention


def test_names_the_path_of_the_same_call():
    ids, count = irpe_buckets(6, 6)
    table = torch.zeros(1, count, 5)
    assert sr_attention_backend(QUERY) == "torch"
    assert sr_attention_backend(QUERY, QUERY, QUERY, topk=4, buckets=ids, table_v=table) == "torch"
    assert sr_attention_backend(QUERY, topk=4, backend="reference") == "reference"
    with pytest.raises(ValueError, match="dropout is 0.1, which the reference has not"):
        sr_attention_backend(QUERY, dropout=0.1, backend="reference")
    with pytest.raises(ValueError, match="topk is 0"):
        sr_attention_backend(QUERY, topk=0)


@pytest.mark.gpu
def test_names_torch_on_a_gpu_where_fusion_is_not_needed_or_not_possible():
    query = QUERY.cuda()
    learned = torch.zeros(1, 1, 37, 37, device="cuda", requires_grad=True)
    assert sr_attention_backend(query, topk=4) == "triton"
    for changes in ({}, {"topk": 40}, {"topk": 4, "dropout": 0.1}, {"topk": 4, "bias": learned}):
        assert sr_attention_backend(query, **changes) == "torch"


@pytest.mark.parametrize("settings", [{"topk": 4}, {"topk": 30}, {"irpe": "bias"}])
def test_training_follows_an_evaluation_in_inference_mode(settings):
    irpe._cached_ids.cache_clear()
    layer, x = SRAttention(15, num_heads=3, **settings), torch.randn(2, 37, 15)
    with torch.inference_mode():
        expected = layer(x)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)


TRACED = """
import torch
from cytossl_core.attention import SRAttention

for irpe in ("none", "qkv"):
    layer = SRAttention(15, num_heads=3, topk=4, irpe=irpe).eval()
    for table in (layer.table_q, layer.table_k, layer.table_v):
        if table is not None:
            torch.nn.init.normal_(table)
    traced = torch.jit.trace(layer, torch.randn(2, 37, 15), check_trace=False)
    for _ in range(2):
        x = torch.randn(2, 37, 15)
        torch.testing.assert_close(traced(x), layer(x))
"""


def test_a_trace_gives_the_numbers_of_other_inputs():
    """In a process of its own: sizes are tensors to torch.jit, which pytest's checks refuse."""
    command = [sys.executable, "-W", "ignore", "-c", TRACED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transforms_of_functions_give_the_numbers_of_loops():
    irpe._cached_ids.cache_clear()

    def attend(x):
        ids, count = irpe_buckets(6, 6)
        table = torch.linspace(-1, 1, count * 5).view(1, count, 5)
        return sr_attention(x, x, x, topk=4, buckets=ids, table_k=table)

    many = torch.stack([QUERY, QUERY + 1])
    found = torch.vmap(attend)(many)
    torch.testing.assert_close(found, torch.stack([attend(each) for each in many]))
    irpe._cached_ids.cache_clear()
    found = torch.func.grad(lambda x: attend(x).square().sum())(QUERY)
    query = QUERY.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(attend(query).square().sum(), query)[0])


def test_fake_and_meta_tensors_get_shapes():
    layer, x = SRAttention(15, num_heads=3, topk=4), torch.randn(2, 37, 15)
    irpe._cached_ids.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (2, 37, 15)
    layer(x)
    layer = SRAttention(15, num_heads=3, topk=4, device="meta")
    assert layer(x.to("meta")).shape == (2, 37, 15)


def call(ids, rows=50):
    return sr_attention(QUERY, QUERY, QUERY, topk=4, buckets=ids, table_k=torch.randn(1, rows, 5))


def test_ids_of_a_user_are_let_go():
    ids = irpe_buckets(6, 6)[0].clone()
    call(ids)
    held = weakref.ref(ids)
    del ids
    gc.collect()
    assert held() is None


def test_ids_changed_in_place_are_looked_at_again():
    ids = irpe_buckets(6, 6)[0].clone()
    call(ids)
    ids[3, 4] = 50
    with pytest.raises(ValueError, match="table_k has 50 buckets, but the largest of the ids is 5"):
        call(ids)
    ids[3, 4] = -1
    with pytest.raises(ValueError, match="buckets hold -1: ids must be 0 or more"):
        call(ids)


def test_cached_ids_that_someone_wrote_into_are_made_anew():
    ids, _ = irpe_buckets(6, 6)
    before = ids.clone()
    ids[3, 4] = 7
    assert inputs.origin(ids) is None
    again, _ = irpe_buckets(6, 6)
    assert torch.equal(again, before)


def test_ids_made_in_inference_mode_by_a_user_are_checked_too():
    with torch.inference_mode():
        ids = irpe_buckets(6, 6)[0] + 0
        with pytest.raises(ValueError, match="the largest of the ids is 49"):
            call(ids, rows=49)
