from pathlib import Path

import pytest

from stages.common import fingerprint

VERB = '''"""A stage."""
from stages.common import part
from cytossl_core.attention import kernel

def make():
    """Make it."""
    return part.VALUE  # why
'''


def tree(root: Path, verb: str = VERB, part: str = "VALUE = 3\n", kernel: str = "K = 1\n") -> Path:
    files = {
        "stages/__init__.py": "",
        "stages/verb.py": verb,
        "stages/common/__init__.py": "",
        "stages/common/part.py": part,
        "stages/common/other.py": "OTHER = 1\n",
        "stages/common/run.py": "ENGINE = 1\n",
        "cytossl_core/__init__.py": "",
        "cytossl_core/attention/__init__.py": "from .kernel import K\n",
        "cytossl_core/attention/kernel.py": kernel,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def digest(root: Path) -> str:
    fingerprint._tree.cache_clear()
    return fingerprint.code_digest(("stages.verb",), root)


def test_reaches_what_is_imported_and_nothing_else(tmp_path):
    found = fingerprint.reach(("stages.verb",), tree(tmp_path))
    assert found == {
        "stages",
        "stages.verb",
        "stages.common",
        "stages.common.part",
        "cytossl_core",
        "cytossl_core.attention",
        "cytossl_core.attention.kernel",
    }


def test_comments_docstrings_and_layout_cost_nothing(tmp_path):
    before = digest(tree(tmp_path))
    edited = VERB.replace("# why", "# another reason").replace("Make it.", "Make it well.")
    assert digest(tree(tmp_path, verb=edited, part="# new\nVALUE   =   3\n")) == before


@pytest.mark.parametrize(
    "change",
    [
        {"verb": VERB.replace("part.VALUE", "part.VALUE + 1")},
        {"part": "VALUE = 4\n"},
        {"kernel": "K = 2\n"},
    ],
)
def test_an_edit_of_reached_code_changes_the_digest(tmp_path, change):
    before = digest(tree(tmp_path))
    assert digest(tree(tmp_path, **change)) != before


def test_an_edit_of_the_engine_or_of_unreached_code_does_not(tmp_path):
    before = digest(tree(tmp_path, verb=VERB + "from stages.common import run\n"))
    (tmp_path / "stages/common/run.py").write_text("ENGINE = 2\n")
    (tmp_path / "stages/common/other.py").write_text("OTHER = 2\n")
    assert digest(tmp_path) == before


def test_refuses_modules_that_do_not_exist():
    with pytest.raises(ValueError, match=r"stages\.nothing is no module of this repository"):
        fingerprint.code_digest(("stages.nothing",))
