"""What is taken away: ONNX files, model cards, and the lines that load an encoder elsewhere."""

import dataclasses
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import export as command
from stages.common import card, encoders, export
from stages.common.encoders import EncoderSpec
from stages.common.spec import Base

onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
THIRDS = (0.3, 0.4, 0.5)
SPEC = EncoderSpec("test_vit", 40, 8, 3, "qkv", THIRDS, THIRDS, patch_px=61, mpp=0.5)
RESNET = dataclasses.replace(
    SPEC, architecture="resnet18", image_px=64, token_px=0, sparse_topk=0, irpe="none"
)
MADE = {
    "method": "dino",
    "data": "0d1e2f",
    "steps": 7,
    "params": {"pretrain": {"epochs": 3, "learning_rate": 5e-4, "init_from": "/home/mary/old"}},
}


def saved(folder: Path, spec: EncoderSpec) -> torch.nn.Module:
    torch.manual_seed(2)
    model = encoders.build(spec).eval()
    for weight in model.parameters():
        if spec is not RESNET:
            torch.nn.init.normal_(weight, std=0.2)
    encoders.save(folder, model, spec, MADE)
    return model


def images(batch: int, px: int) -> torch.Tensor:
    return torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("spec", [SPEC, RESNET], ids=lambda spec: spec.architecture)
def test_onnx_computes_what_torch_does_at_any_batch(tmp_path, spec):
    model = saved(tmp_path / "made", spec)
    target = tmp_path / "new" / "encoder.onnx"
    assert export.to_onnx(tmp_path / "made", target) < 1e-4
    assert os.listdir(target.parent) == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        given = images(batch, spec.image_px)
        (got,) = session.run(["embedding"], {"images": given.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(given).numpy(), rtol=1e-4, atol=1e-4)
    described = json.loads(session.get_modelmeta().custom_metadata_map["spec"])
    assert described["sparse_topk"] == spec.sparse_topk


def test_onnx_selects_keys(tmp_path):
    """The same weights without selection are far away, so the comparison above means something."""
    model = saved(tmp_path, SPEC)
    dense = encoders.build(dataclasses.replace(SPEC, sparse_topk=0)).eval()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (model(images(2, 40)) - dense(images(2, 40))).abs().max() > 1e-2


def test_large_weights_lie_beside_the_file_and_libraries_are_quiet(tmp_path, monkeypatch, caplog):
    saved(tmp_path / "made", SPEC)
    monkeypatch.setattr(export, "MOST_INSIDE", 1000)
    with caplog.at_level(logging.INFO):
        command.main(tmp_path / "made", tmp_path / "new" / "encoder.onnx")
    assert {record.name for record in caplog.records} == {"stages.export"}
    assert sorted(os.listdir(tmp_path / "new")) == ["encoder.onnx", "encoder.onnx.data"]
    onnxruntime.InferenceSession(tmp_path / "new" / "encoder.onnx")


def test_refuses_an_export_that_differs_and_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "made", RESNET)
    monkeypatch.setattr(export, "_embed", lambda model, given: np.full((len(given), 512), 9.0))
    with pytest.raises(ValueError, match="differs from torch's by .* no more than 0.0001"):
        export.to_onnx(tmp_path / "made", tmp_path / "encoder.onnx")
    assert os.listdir(tmp_path) == ["made"]


def test_export_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript, .*pip install '.\[onnx\]'"):
        export.to_onnx(tmp_path, tmp_path / "encoder.onnx")


def test_export_says_how_it_is_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", "one"])
    with pytest.raises(ValueError, match=r"got \['one'\]: give an encoder's folder, and a file"):
        command.command()


def python_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def runs(lines: str) -> torch.nn.Module:
    names: dict = {}
    exec(lines, names)
    return names["encoder"].eval()


def test_the_readmes_three_lines_load_an_encoder(tmp_path, monkeypatch):
    model = saved(tmp_path / "data" / "pretrain" / "pretrained", SPEC)
    monkeypatch.chdir(tmp_path)
    (lines,) = [it for it in python_of((ROOT / "README.md").read_text()) if "json.loads" in it]
    with torch.no_grad():
        assert torch.equal(runs(lines)(images(2, 40)), model(images(2, 40)))


@pytest.mark.parametrize("spec", [SPEC, RESNET], ids=lambda spec: spec.architecture)
def test_the_cards_lines_load_the_encoder(tmp_path, monkeypatch, spec):
    model = saved(tmp_path, spec)
    card.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    (lines,) = python_of((tmp_path / card.CARD).read_text())
    given = images(2, spec.image_px)
    with torch.no_grad():
        assert torch.equal(runs(lines)(given), model(given))


def test_card_tells_what_how_and_counts_but_no_places(tmp_path):
    model = saved(tmp_path, SPEC)
    model.base = Base("/home/mary/S-0412/released.safetensors", "apache-2.0", "")
    told = {"counts": {"slides": 5, "patches": 83}, "metrics": {"loss": 1.23456, "RankMe": 40.0}}
    encoders.save(tmp_path, model, SPEC, {**MADE, **told})
    card.write(tmp_path)
    text = (tmp_path / card.CARD).read_text()
    for line in (
        "# test_vit, dino",
        "| keys that a query attends to | 3 |",
        "| relative positions | qkv |",
        "| began with | the weights of released.safetensors |",
        "| steps | 7 |",
        "| learning rate | 0.0005 |",
        "| slides | 5 |",
        "| patches | 83 |",
        "| digest | 0d1e2f |",
        "| loss | 1.235 |",
        "- base weights: apache-2.0",
        "61 px at 0.5 microns per pixel",
        "over std 0.3 / 0.4 / 0.5",
    ):
        assert line in text
    assert "mary" not in text
    assert "S-0412" not in text


def test_description_says_version_and_licence(tmp_path):
    saved(tmp_path, SPEC)
    described = json.loads((tmp_path / encoders.DESCRIPTION).read_text())
    assert re.fullmatch(
        r"[0-9a-f]{40}( with changes)?|cytossl .*", described["provenance"]["version"]
    )
    assert described["licence"]["code"] == "Apache-2.0"
    assert described["licence"]["base_weights"].startswith("there are none")
