"""What the Triton kernels allocate, read and remember."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cytossl_core.attention import fused, sr_attention
from cytossl_core.attention.fused import fused_attention
from cytossl_core.attention.reference import reference_attention
from tests.conftest import TOLERANCE
from tests.core.fused_cases import on, problem, run_fused
from tests.core.test_attention import assert_same

if fused.UNUSABLE is None:
    from triton.runtime.errors import OutOfResources

    from cytossl_core.attention import bucket_plan, launch, operators
    from tests.core.kernels import write_running


def test_takes_the_layers_strides(device):
    x = problem(37, 16, dtype=torch.float32)
    packed = torch.stack([x.query, x.key, x.value]).permute(1, 3, 0, 2, 4).contiguous().to(device)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    arguments = {"topk": 16, "buckets": x.buckets.to(device)}
    arguments |= {name: table.to(device) for name, table in x.tables.items()}
    found = sr_attention(query, key, value, backend="triton", **arguments)
    expected = reference_attention(x).to(device)
    assert_same([found], [expected], TOLERANCE[torch.float32])


def test_same_inputs_give_the_same_bits(device):
    x = on(device, problem(17, 7, dtype=torch.float32, batch=3))
    first, second = run_fused(x), run_fused(x)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


class Allocated(TorchDispatchMode):
    """Bytes of everything that is made, but for what depends on the bucket ids alone."""

    def __init__(self, ids):
        super().__init__()
        self.bytes, self.ids = 0, ids

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function._schema.name.startswith(("aten::new_", "aten::empty")):
            self.bytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize(("token", "heads"), [(37, 3), (197, 3), (257, 12), (1025, 3)])
def test_memory_stays_near_that_of_flash_attention(token, heads):
    """Bytes of both operators against out, its log-sum-exp and gradients, by their fakes' words."""
    pytest.importorskip("triton")
    query = torch.empty(64, heads, token, 64, dtype=torch.bfloat16, device="meta")
    table = torch.empty(1, 50, 64, device="meta")
    flash = 4 * query.numel() * 2 + 2 * query[..., 0].numel() * 4
    out, lse, kept = operators._empty(query)
    parts = launch.programs_of(query, [table, table], 10**9, 132) * 2 * 50 * 64 * 4
    rows = sum(t.numel() * t.element_size() for t in (out, lse, lse, kept)) + 3 * query.numel() * 2
    assert rows + parts <= 1.3 * flash + 0.2 * flash * (token > 1000)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [(1, 1, 1), (0, 0, 0)])
def test_nothing_is_made_that_grows_with_buckets_or_pairs(device, heads):
    """One bit per pair apart, which `kept` takes, twice the tokens make twice the bytes."""
    found = []
    for token in (17, 34):
        x = on(device, problem(token, 5, heads, torch.float16, batch=1, dim=8))
        run_fused(x)  # the plan of the ids is made once
        with Allocated(x.buckets) as made:
            run_fused(x)
        found.append(made.bytes - 3 * token * 4 * ((token + 31) // 32))
    tables = 3 * 1 * 26 * 8 * 8 * 8
    assert found[1] <= 2 * found[0] + tables


def test_bucket_ids_edited_in_place_are_read_anew(device):
    x = on(device, problem(17, 7, dtype=torch.float32, batch=1))
    fused_attention(x)
    x.buckets.copy_(x.buckets.flip(0))
    y = replace(x, buckets=x.buckets.clone())
    assert torch.equal(fused_attention(x), fused_attention(y))


def test_bucket_ids_are_forgotten_with_their_tensor(device):
    ids = torch.zeros(17, 17, dtype=torch.int64, device=device)
    first = bucket_plan.plan_of(ids, 3, 32, 16)
    assert bucket_plan.plan_of(ids, 3, 32, 16) is first
    gone = weakref.ref(ids)
    del ids
    assert gone() is None


def test_ids_first_seen_in_inference_mode_train(device):
    with torch.inference_mode():
        inferred = torch.zeros(17, 17, dtype=torch.int64, device=device)
        made = bucket_plan.plan_of(inferred, 3, 32, 16)
    assert not made.ids.is_inference()
    x = on(device, problem(17, 7, dtype=torch.float32, batch=1))
    with torch.inference_mode():
        fused_attention(x)
    run_fused(x)


def test_ids_outside_the_table_read_nothing(device):
    x = on(device, problem(17, 7, (1, 1, 1), torch.float32, batch=1))
    x = replace(x, buckets=torch.full_like(x.buckets, 30000))
    plain = replace(x, table_q=None, table_k=None, table_v=None, buckets=None)
    assert torch.equal(fused_attention(x), fused_attention(plain))


def test_running_sums_start_anew_at_each_first(device):
    random = torch.Generator().manual_seed(4)
    values = torch.randint(-9, 9, (16, 16), generator=random).float().to(device)
    first = (torch.rand(16, 16, generator=random) < 0.3).int().to(device)
    found = torch.zeros(2, 16, 16, device=device)
    write_running[(1,)](values, first, found)
    expected = values.clone()
    for column in range(1, 16):
        expected[:, column] += expected[:, column - 1] * (1 - first[:, column])
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def test_takes_smaller_tiles_where_shared_memory_is_short():
    pytest.importorskip("triton")
    tried, query = [], torch.zeros(1, 1, 17, 5)
    launch._fitting.clear()

    def start(tile):
        tried.append(tile)
        if tile["BLOCK_M"] > 16:
            raise OutOfResources(200_000, 65_536, "shared memory")

    tiles = launch.forward_tiles(197, 64, 16, tables=True, half=True)
    for _ in range(2):
        launch.launch(start, "kernel", query, tiles, ())
    assert [tile["BLOCK_M"] for tile in tried] == [32, 16, 16]  # remembered the second time

    def refuse(tile):
        raise OutOfResources(200_000, 65_536, "shared memory")

    with pytest.raises(
        ValueError, match="head_dim is 5 in torch.float32, which cpu has too little"
    ):
        launch.launch(refuse, "other", query, tiles, ())
    launch._fitting.clear()


def test_an_empty_batch_stays_empty(device):
    query = torch.zeros(0, 3, 17, 5, device=device, requires_grad=True)
    sr_attention(query, query, query, topk=4, backend="triton").sum().backward()
    assert query.grad.shape == (0, 3, 17, 5)


def test_operators_tell_compilers_the_truth(device):
    x = on(device, problem(17, 3, (0, 0, 0), torch.float32, batch=1))
    y = on(device, problem(17, 3, (3, 1, 1), torch.float32, batch=1))
    arguments = (x.query, x.key, x.value, None, None, None, None, None, 0.5, 3)
    given = (x.query, x.key, x.value, y.table_k, None, y.table_v, None, y.buckets, 0.5, 3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for some in (arguments, given):
        torch.library.opcheck(torch.ops.cytossl.sr_forward, some, test_utils=checks)
