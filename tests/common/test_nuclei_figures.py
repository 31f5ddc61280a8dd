"""The report's plots of nuclei: bars hold what the tables say, on axes that fit skewed counts."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from stages.common import nuclei_figures


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """Heights of the bars and labels of the ticks of the plot that is drawn next."""
    seen: dict[str, list] = {}
    draw, label = Axes.bar, Axes.set_xticks
    monkeypatch.setattr(
        Axes, "bar", lambda *a, **k: (seen.update(heights=list(a[2])), draw(*a, **k))[1]
    )
    monkeypatch.setattr(
        Axes, "set_xticks", lambda *a, **k: (seen.update(labels=list(a[2])), label(*a, **k))[1]
    )
    return seen


def test_a_bar_for_each_small_count_and_classes_above(drawn):
    counts = [0, 0, 1, 3, 7, 8, 9, 12, 49, 50, 99, 100, 5000]
    table = pd.Series(counts).value_counts().rename_axis("nuclei").reset_index(name="patches")
    page = nuclei_figures.per_patch(table.sort_values("nuclei"))
    held = dict(zip(drawn["labels"], drawn["heights"], strict=True))
    assert held == {
        "0": 2, "1": 1, "2": 0, "3": 1, "4": 0, "5": 0, "6–7": 1, "8–9": 2, "10–14": 1,
        "15–19": 0, "20–29": 0, "30–49": 1, "50–99": 2, "100–199": 1, "200–499": 0,
        "500–999": 0, "1000+": 1,
    }  # fmt: skip
    assert "1000+" in page and "6–7" in page


@pytest.mark.parametrize("most", [0, 1, 5, 6, 7, 999, 1000, 1001])
def test_no_patch_is_lost_whatever_the_most_is(drawn, most):
    table = pd.DataFrame({"nuclei": np.arange(most + 1), "patches": 3})
    nuclei_figures.per_patch(table)
    assert sum(drawn["heights"]) == 3 * (most + 1) and drawn["heights"][-1] > 0


def test_no_patches_at_all_leave_a_plot():
    empty = pd.DataFrame({"nuclei": [], "patches": []})
    assert "<svg" in nuclei_figures.per_patch(empty)
