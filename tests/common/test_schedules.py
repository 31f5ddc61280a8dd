"""Schedules: values computed by hand."""

import pytest

from stages.common.schedules import cosine, warmup_cosine, warmup_flat


def test_schedules_by_hand():
    assert cosine(0.996, 1.0, 0.0) == 0.996
    assert cosine(0.996, 1.0, 0.5) == pytest.approx(0.998)
    assert cosine(0.04, 0.4, 1 / 3) == pytest.approx(0.04 + 0.36 / 4)
    assert warmup_cosine(5e-4, 1e-6, 0.2, 0.0) == 0
    assert warmup_cosine(5e-4, 1e-6, 0.2, 0.05) == pytest.approx(1.25e-4)
    assert warmup_cosine(5e-4, 1e-6, 0.2, 0.2) == pytest.approx(5e-4)
    assert warmup_cosine(5e-4, 1e-6, 0.2, 0.6) == pytest.approx((5e-4 + 1e-6) / 2)
    assert warmup_cosine(5e-4, 1e-6, 0.0, 0.0) == 5e-4
    assert warmup_flat(0.04, 0.07, 0.3, 0.1) == pytest.approx(0.05)
    assert warmup_flat(0.04, 0.07, 0.3, 0.3) == 0.07
    assert warmup_flat(0.04, 0.07, 0.0, 0.0) == 0.07
