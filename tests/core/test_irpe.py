"""iRPE buckets against loops over the published equations."""

import pytest
import torch

from cytossl_core.attention import irpe_buckets
from cytossl_core.attention.irpe import cross_table, table_rows
from tests.definitions import attention as definition

GRIDS = [(1, 1), (1, 7), (5, 3), (6, 6), (14, 14), (3, 17)]


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization"])
@pytest.mark.parametrize("ratio", [0.7, 1.9, 3.0, 20.0])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_matches_the_published_equations(method, ratio, height, width):
    for special in (0, 1, 5):
        ids, _ = irpe_buckets(height, width, method=method, ratio=ratio, special_tokens=special)
        assert ids.tolist() == definition.buckets(height, width, method, ratio, special)


@pytest.mark.parametrize("method", ["product", "euclidean", "quantization"])
def test_is_exact_on_every_offset_of_a_64_x_64_grid(method):
    """Ids depend on offsets alone, so the first and the last query see every offset there is."""
    ids, _ = irpe_buckets(64, 64, method=method, special_tokens=0)
    where = [(y, x) for y in range(64) for x in range(64)]
    for query in (0, 63, 64 * 63, 64 * 64 - 1):
        expected = [definition.bucket(where[query], key, method, 1.9) for key in where]
        assert ids[query].tolist() == expected


def test_ids_depend_on_the_offset_alone():
    ids = irpe_buckets(7, 5, special_tokens=0)[0].view(7, 5, 7, 5)
    assert torch.equal(ids[:-1, :-1, :-1, :-1], ids[1:, 1:, 1:, 1:])


def test_ratio_of_the_paper_maps_offsets_to_seven_bins_an_axis():
    ids, count = irpe_buckets(1, 11, special_tokens=0)
    bins = (ids[5] - 24).tolist()  # offset is query minus key
    assert bins == [3, 3, 2, 2, 1, 0, -1, -2, -2, -3, -3]
    assert count == 49


@pytest.mark.parametrize(
    ("method", "ratio", "used", "count"),
    [("product", 1.9, 50, 50), ("euclidean", 20.0, 20, 82), ("quantization", 33.0, 51, 134)],
)
def test_uses_as_many_buckets_as_the_published_models(method, ratio, used, count):
    ids, found = irpe_buckets(14, 14, method=method, ratio=ratio)
    assert (len(ids.unique()), found) == (used, count)


def test_one_table_serves_both_crops():
    for side in (6, 14):
        ids, count = irpe_buckets(side, side)
        assert ids.unique().tolist() == list(range(count))


def test_special_tokens_share_the_last_bucket():
    ids, count = irpe_buckets(3, 5, special_tokens=3)
    special = torch.zeros(18, 18, dtype=torch.bool)
    special[:3], special[:, :3] = True, True
    assert torch.equal(ids == count - 1, special)


def test_same_grid_is_computed_once():
    assert irpe_buckets(4, 9)[0] is irpe_buckets(4, 9)[0]


def test_cross_is_a_row_table_plus_a_column_table():
    special, width = 1, 2
    rows = table_rows("cross", 1.9, special)
    table = torch.randn(3, rows, width, dtype=torch.float64)
    ids, count = irpe_buckets(5, 3, method="cross", special_tokens=special)
    total = cross_table(table, special)
    assert total.shape == (3, count, width)
    for query, key in [(1, 15), (15, 1), (7, 7), (4, 11)]:
        down = (query - 1) // 3 - (key - 1) // 3
        right = (query - 1) % 3 - (key - 1) % 3
        row = table[:, definition.piecewise(down, 1.9) + 3]
        column = table[:, rows // 2 + definition.piecewise(right, 1.9) + 3]
        assert torch.equal(total[:, ids[query, key]], row + column)
    assert torch.equal(total[:, -1], table[:, rows // 2 - 1] + table[:, -1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "polar"}, "iRPE method is 'polar': choose one of product, euclidean"),
        ({"ratio": 0.0}, "iRPE ratio is 0.0: it must be above 0"),
        ({"ratio": float("inf")}, "iRPE ratio is inf: it must be above 0 and finite"),
        ({"special_tokens": -1}, "special_tokens is -1: it must be 0 or more"),
        ({"height": 0}, "token grid is 0 x 3"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        irpe_buckets(**{"height": 2, "width": 3} | arguments)
