"""The views that pretraining's tests train on."""

from pathlib import Path

import pytest
import torch

from tests.stages import runs


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    for name, count in runs.COUNTS.items():
        runs.a_slide(tmp_path / "data" / "perturb", name, count)
    return tmp_path / "data" / "perturb"
