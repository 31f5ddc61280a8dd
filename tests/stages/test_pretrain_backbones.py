"""Pretraining of what is no plain ViT from random numbers: ResNets, adapters, earlier encoders."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stages.common import architectures, card, encoders
from stages.common.params import Top
from tests.stages.runs import STEPS, TOP, changed, train

SMALL = {**architectures.PUBLISHED[architectures.GIGAPATH]}
SMALL |= {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Random weights of Prov-GigaPath, of a size for tests."""
    monkeypatch.setitem(architectures.PUBLISHED, architectures.GIGAPATH, SMALL)
    path = tmp_path / "gigapath.safetensors"
    torch.manual_seed(1)
    model = timm.create_model(**SMALL, img_size=48, patch_size=16, num_classes=0)
    save_file(model.state_dict(), path)
    return path


def arrays(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / encoders.WEIGHTS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_trained_and_the_base_weights_are_not(source, released, checkpointing):
    settings = changed(
        backbone=architectures.GIGAPATH,
        weights=str(released),
        adapter="lora",
        gradient_checkpointing=checkpointing,
        drop_path=0.0,
    )
    made = train(source, settings)
    before, after = arrays(made / "untrained"), arrays(made / "pretrained")
    assert before.keys() == after.keys()
    assert all(".lora_" in name or ".table_k" in name for name in after)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    merged = encoders.load(made / "pretrained")[0].state_dict()
    base = load_file(released)
    assert torch.equal(merged["norm.weight"], base["norm.weight"])
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])


def test_resnet_is_trained_on_views_of_any_side(source):
    settings = changed(backbone="resnet18", token_px=0, drop_path=0.0, epochs=1)
    made = train(source, settings, top=Top(TOP.seed, 0, "none"))
    before, after = arrays(made / "untrained"), arrays(made / "pretrained")
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert (after["bn1.running_var"] != 1).all()
    model, _ = encoders.load(made / "pretrained")
    assert model(torch.zeros(2, 3, 24, 24)).shape == (2, 512)


def test_a_run_goes_on_from_the_encoder_of_another(source, tmp_path):
    first = train(source).rename(tmp_path / "first")
    again = train(source, changed(init_from=str(first / "pretrained"), epochs=1))
    was, begun = arrays(first / "pretrained"), arrays(again / "untrained")
    assert all(torch.equal(was[name], begun[name]) for name in was)
    described = json.loads((again / "pretrained" / encoders.DESCRIPTION).read_text())
    assert described["provenance"]["method"] == "dino"


def test_a_card_lies_beside_the_encoder(source):
    text = (train(source) / "pretrained" / card.CARD).read_text()
    for line in ("| slides | 3 |", "| patches | 18 |", f"| steps | {STEPS} |", "| loss | "):
        assert line in text
