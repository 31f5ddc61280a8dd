"""The views that pretraining's tests train on, and the cohort that evaluation's tests score."""

import logging
from pathlib import Path

import pytest
import torch

from tests.stages import runs
from tests.stages.evaluated import Laboratory


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    for name, count in runs.COUNTS.items():
        runs.a_slide(tmp_path / "data" / "perturb", name, count)
    return tmp_path / "data" / "perturb"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> Laboratory:
    """30 slides of two classes, split as the cohort says."""
    caplog.set_level(logging.INFO)
    made = Laboratory(tmp_path, monkeypatch)
    made.write_bags()
    made.split()
    made.settings()
    return made
