"""What a slide may be called."""

import unicodedata

import pytest

from stages.common import slide_names


@pytest.mark.parametrize(
    "name",
    [
        "S 01 (copy), A&B; it's #3!.a",
        "สไลด์ที่ 1",
        "स्लाइड",
        unicodedata.normalize("NFD", "Lámina ü"),
        "細胞",
        "_draft",
        "consul",
        "com",
        "slides 2",
        "a" * 120,
        "ü" * 60,
    ],
)
def test_a_name_that_a_hospital_uses(name, tmp_path):
    assert slide_names.fault(name) == ""
    (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *[(f"a{c}b", "in it") for c in '<>:"/\\|?*\n\x00\x7f\x85\u2028\ud800'],
        *[(name, "begins with") for name in ("", ".a", "..", "-a", " a", "\u3000a")],
        *[(name, "ends with") for name in ("a.", "a ", "a\u00a0")],
        *[(name, "has this name") for name in ("con", "AUX", "nul.tif", "Com1", "LPT9.a", "prn")],
        *[(name, "has this name") for name in ("slides", "failed.csv", "x.CSV", "metrics.json")],
        ("a" * 121, "longer than 120 bytes"),
        ("ü" * 61, "longer than 120 bytes"),
    ],
)
def test_a_name_that_is_none_somewhere(name, why):
    assert why in slide_names.fault(name)
