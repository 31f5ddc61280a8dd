"""Backbones: the paper's architectures, and where an encoder begins."""

import copy
import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stages import export
from stages.common import architectures, backbones, card, encoders, weights
from stages.common.params import Top
from stages.common.spec import LoraParams

LORA = LoraParams(rank=3, alpha=6.0, dropout=0.0)
SETTINGS = SimpleNamespace(
    backbone="test_vit",
    token_px=8,
    global_px=40,
    drop_path=0.0,
    weights="none",
    init_from="",
    adapter="none",
    lora=LORA,
)
# Prov-GigaPath's architecture, of a size for tests.
SMALL = {**architectures.PUBLISHED[architectures.GIGAPATH]}
SMALL |= {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    monkeypatch.setitem(architectures.PUBLISHED, architectures.GIGAPATH, SMALL)
    torch.manual_seed(5)


def begin(topk: int = 3, irpe: str = "k", **changes):
    """Spec and encoder of a run with these settings."""
    settings = SimpleNamespace(**{**vars(SETTINGS), **changes})
    spec = backbones.describe(settings, Top(7, topk, irpe), patch_px=61, mpp=0.5)
    return spec, backbones.prepare(spec, settings).eval()


def images(px: int = 40) -> torch.Tensor:
    return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(px))


@torch.no_grad()
def embed(model: torch.nn.Module, px: int = 40) -> torch.Tensor:
    return model(images(px))


def jiggle(model: torch.nn.Module) -> None:
    """A step of training, so to speak."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn_like(value)


def draw(path, name="test_vit", **arguments):
    """A file of random weights of one of timm's models, and the model."""
    model = timm.create_model(name, **arguments).eval()
    jiggle(model)
    save_file(model.state_dict(), path)
    return model


@pytest.mark.parametrize(
    ("architecture", "px", "token_px", "count"),
    [
        ("vit_tiny_patch16_224", 224, 16, 5_524_416),
        ("vit_small_patch16_224", 224, 16, 21_665_664),
        ("vit_base_patch16_224", 224, 16, 85_798_656),
        ("vit_small_patch14_dinov2", 518, 14, 22_056_576 - 384),  # less the mask token
        ("vit_base_patch14_dinov2", 518, 14, 86_580_480 - 768),
        ("vit_large_patch14_dinov2", 518, 14, 304_368_640 - 1024),
        ("vit_large_patch14_reg4_dinov2.lvd142m", 518, 14, 304_371_712 - 1024),
        (architectures.GIGAPATH, 224, 16, 1_134_953_984),
        ("vpu_cnn_384", 128, 0, 1_109_362),  # LESS: 1.1 and 3.4 million
        ("vpu_cnn_768", 256, 0, 3_413_746),
    ],
)
def test_has_as_many_weights_as_published(monkeypatch, architecture, px, token_px, count):
    monkeypatch.undo()  # Prov-GigaPath in full; on the meta device it costs nothing
    spec = dataclasses.replace(begin()[0], architecture=architecture)
    spec = dataclasses.replace(
        spec, image_px=px, token_px=token_px, irpe="none", sparse_topk=3 if token_px else 0
    )
    model = encoders.build(spec, empty=True)
    assert sum(value.numel() for value in model.parameters()) == count


def test_gigapath_has_gated_mlps_and_layer_scale_and_any_side():
    _, model = begin(backbone=architectures.GIGAPATH)
    assert model.blocks[0].mlp.fc1.out_features == 2 * model.blocks[0].mlp.fc2.in_features
    assert model.blocks[1].ls2.gamma.shape == (48,)
    assert embed(model, 56).shape == (2, 48)


def test_registers_are_special_tokens():
    _, model = begin(backbone="vit_small_patch14_reg4_dinov2", token_px=20)
    assert model.blocks[0].attn.special_tokens == 5
    assert embed(model).isfinite().all()


def test_resnet_gives_timms_pooled_features():
    spec, ours = begin(0, "none", backbone="resnet18", token_px=0)
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(embed(ours, 64), embed(theirs, 64))
    assert ours.num_features == 512
    assert spec.token_px == 0


@pytest.mark.parametrize(
    ("topk", "irpe", "token_px", "message"),
    [
        (3, "none", 0, "sparse_topk is 3 and resnet18 has no attention .* set sparse_topk to 0"),
        (0, "k", 0, "irpe is k and resnet18 has no attention .* set irpe to none"),
        (0, "none", 8, "token_px is 8 and resnet18 has no attention .* set token_px to 0"),
    ],
)
def test_resnet_takes_no_attention(topk, irpe, token_px, message):
    with pytest.raises(ValueError, match=message):
        begin(topk, irpe, backbone="resnet18", token_px=token_px)


def test_rejects_a_vision_transformer_without_a_class_token_or_tokens():
    with pytest.raises(ValueError, match="has no class token, which is the embedding here"):
        begin(backbone="vit_base_patch16_siglip_224")
    with pytest.raises(ValueError, match="no whole number of tokens of 0 px"):
        begin(token_px=0)


def test_weights_of_another_size_are_resampled_as_timm_does(tmp_path):
    path = tmp_path / "released.safetensors"
    draw(path)  # 160 px, tokens of 16 px, and a head
    _, ours = begin(0, "none", weights=str(path))
    theirs = timm.create_model(
        "test_vit",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        img_size=40,
        patch_size=8,
        num_classes=0,
    )
    torch.testing.assert_close(embed(ours), embed(theirs.eval()))
    assert ours.base.licence.startswith("not stated in released.safetensors")


def test_weights_with_sr_attention_are_those_of_the_file(tmp_path):
    path = tmp_path / "released.safetensors"
    theirs = draw(path, img_size=40, patch_size=8)
    _, ours = begin(weights=str(path))
    for name, value in ours.state_dict().items():
        wanted = 0 if ".table_" in name else theirs.state_dict()[name]
        assert (value == wanted).all(), name


def test_half_precision_weights_become_float32(tmp_path):
    path = tmp_path / "half.safetensors"
    model = draw(path, img_size=40, patch_size=8)
    save_file(model.half().state_dict(), path)
    _, ours = begin(weights=str(path))
    assert {value.dtype for value in ours.state_dict().values()} == {torch.float32}


def test_resnet_takes_weights_and_their_running_means(tmp_path):
    path = tmp_path / "resnet.safetensors"
    theirs = draw(path, "resnet18")
    theirs.bn1.running_mean += 1
    save_file(theirs.state_dict(), path)
    _, ours = begin(0, "none", backbone="resnet18", token_px=0, weights=str(path))
    assert torch.equal(ours.bn1.running_mean, theirs.bn1.running_mean)
    theirs.reset_classifier(0)
    assert torch.equal(embed(ours), embed(theirs))


def test_refuses_pickled_checkpoints_and_says_how_to_convert(tmp_path):
    for suffix in (".pt", ".bin"):
        with pytest.raises(ValueError, match=r"is pickled.* weights_only=True.*\.safetensors"):
            begin(weights=str(tmp_path / f"released{suffix}"))


def test_says_what_is_wrong_with_a_file_of_weights(tmp_path):
    path = tmp_path / "released.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights at .* must be none, timm or the path"):
        begin(weights=str(path))
    model = draw(path, img_size=40, patch_size=8)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        begin(weights=str(path))
    state = model.state_dict()
    save_file({name: value for name, value in state.items() if name != "norm.bias"}, path)
    with pytest.raises(ValueError, match=r"1 tensors \(norm.bias, ...\) missing, none unknown"):
        begin(weights=str(path))
    save_file({**state, "norm.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"norm.bias is \[3\] and the spec needs \[64\]"):
        begin(weights=str(path))
    draw(path, "test_vit2")
    with pytest.raises(ValueError, match="from .*released.safetensors"):
        begin(weights=str(path))


def test_hub_weights_bring_their_normalisation_and_licence(monkeypatch):
    released = timm.create_model("test_vit", img_size=40, patch_size=8)
    asked = []
    monkeypatch.setattr(
        architectures,
        "load_state_dict_from_hf",
        lambda place: asked.append(place) or released.state_dict(),
    )
    spec, model = begin(weights="timm")
    assert asked == ["timm/test_vit.r160_in1k"]
    assert spec.mean == spec.std == (0.5, 0.5, 0.5)
    assert torch.equal(model.norm.weight, released.norm.weight)
    assert (model.base.weights, model.base.licence) == ("timm", "apache-2.0")


def test_hub_that_is_not_reached_says_what_to_do_and_no_more(monkeypatch):
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # as it is at first

    def refuse(place):
        retries = logging.getLogger("huggingface_hub.utils._http")
        assert not retries.isEnabledFor(logging.WARNING)
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr(architectures, "load_state_dict_from_hf", refuse)
    wanted = (
        r"huggingface.co/prov-gigapath/prov-gigapath: 401 Client Error Accept the terms .* set "
        r"HF_TOKEN .* set `weights` to its path"
    )
    with pytest.raises(OSError, match=wanted):
        begin(backbone=architectures.GIGAPATH, weights="timm")


def test_rejects_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="begins with one of them"):
        begin(weights="timm", init_from="there")
    with pytest.raises(ValueError, match="adapters need trained weights beside them"):
        begin(adapter="lora")


@pytest.fixture
def released(tmp_path):
    """Random weights of the small Prov-GigaPath, as a file."""
    path = tmp_path / "gigapath.safetensors"
    arguments = {name: value for name, value in SMALL.items() if name != "model_name"}
    draw(path, SMALL["model_name"], **arguments, img_size=40, patch_size=8, num_classes=0)
    return path


def adapt(path, **changes):
    given = {"backbone": architectures.GIGAPATH, "adapter": "lora", "weights": str(path)}
    return begin(**{"irpe": "qkv", **given, **changes})


def test_adapters_add_nothing_at_first_and_are_all_that_is_trained(released):
    _, plain = adapt(released, adapter="none")
    _, model = adapt(released)
    assert torch.equal(embed(model), embed(plain))
    trained = {name.split(".", 2)[2] for name, it in model.named_parameters() if it.requires_grad}
    places = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    adapters = {f"{place}.lora_{half}.default.weight" for place in places for half in "AB"}
    assert trained == adapters | {f"attn.table_{name}" for name in "qkv"}
    assert model.base.licence == architectures.GIGAPATH_TERMS


def test_only_adapters_are_saved_and_loading_merges_them(released, tmp_path):
    spec, model = adapt(released)
    jiggle(model)
    encoders.save(tmp_path / "made", copy.deepcopy(model), spec, {"method": "dino"})
    saved = load_file(tmp_path / "made" / encoders.WEIGHTS)
    assert len(saved) == 2 * (8 + 3)
    assert saved["blocks.1.mlp.fc2.lora_B.weight"].shape == (48, 3)
    loaded, read = encoders.load(tmp_path / "made")
    assert read == spec
    assert not [name for name in loaded.state_dict() if "lora" in name]
    torch.testing.assert_close(embed(loaded), embed(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embed(loaded), embed(adapt(released)[1]), atol=1e-2)


def test_merged_encoder_needs_no_base_weights(released, tmp_path):
    spec, model = adapt(released)
    jiggle(model)
    told = {"method": "dino", "counts": {"slides": 5}, "metrics": {"loss": 1.5}}
    encoders.save(tmp_path / "made", model, spec, told)
    export.main(tmp_path / "made", tmp_path / "plain")
    text = (tmp_path / "plain" / card.CARD).read_text()
    for line in ("| LoRA adapters | none |", "| slides | 5 |", "| loss | 1.5 |"):
        assert line in text
    released.unlink()
    loaded, read = encoders.load(tmp_path / "plain")
    assert read == dataclasses.replace(spec, lora=None)
    torch.testing.assert_close(embed(loaded), embed(model), rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "plain" / encoders.DESCRIPTION).read_text())
    assert described["licence"]["base_weights"] == architectures.GIGAPATH_TERMS
    with pytest.raises(ValueError, match="is there already"):
        export.main(tmp_path / "plain", tmp_path / "plain")


def test_adapters_find_their_base_weights_or_say_so(released, tmp_path):
    spec, model = adapt(released)
    encoders.save(tmp_path / "made", model, spec, {})
    released.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="holds adapters, and their base .* base.weights"):
        encoders.load(tmp_path / "made")
    path = tmp_path / "made" / encoders.DESCRIPTION
    path.write_text(path.read_text().replace("gigapath.safetensors", "elsewhere.safetensors"))
    digest = encoders.digest_of(tmp_path / "made")
    assert torch.equal(embed(encoders.load(tmp_path / "made")[0]), embed(model))
    weighty = load_file(tmp_path / "elsewhere.safetensors")
    weighty["norm.bias"] += 1
    save_file(weighty, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="are not those that the adapters .* beside"):
        encoders.load(tmp_path / "made")
    assert encoders.digest_of(tmp_path / "made") == digest


def test_adapters_need_peft_and_attention(released, tmp_path, monkeypatch):
    path = tmp_path / "resnet.safetensors"
    draw(path, "resnet18")
    settings = {"backbone": "resnet18", "token_px": 0, "weights": str(path)}
    with pytest.raises(ValueError, match="adapter is lora and ResNet has no attention"):
        begin(0, "none", adapter="lora", **settings)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install '.\[lora\]'"):
        adapt(released)


@pytest.fixture
def former(tmp_path):
    """A saved encoder with tables on k, and its folder."""
    spec, model = begin()
    jiggle(model)
    encoders.save(tmp_path / "former", model, spec, {})
    return model, tmp_path / "former"


def test_goes_on_from_an_encoder_with_equal_bits(former):
    model, folder = former
    _, again = begin(init_from=str(folder))
    assert torch.equal(embed(again), embed(model))


def test_goes_on_with_more_tables_another_topk_and_side_and_says_so(former, caplog):
    model, folder = former
    with caplog.at_level(logging.INFO):
        _, again = begin(5, "qkv", init_from=str(folder), global_px=48)
    assert torch.equal(again.blocks[0].attn.table_k, model.blocks[0].attn.table_k)
    assert (again.blocks[0].attn.table_v == 0).all()
    assert again.pos_embed.shape == (1, 37, 64)
    for said in ("image_px 40 -> 48", "sparse_topk 3 -> 5", "irpe k -> qkv"):
        assert f"goes on from {folder} with another {said}" in caplog.text


def test_refuses_to_go_on_with_what_would_make_other_numbers(former):
    _, folder = former
    with pytest.raises(ValueError, match=r"irpe k, and this run none: .* to k or qk or qkv$"):
        begin(3, "none", init_from=str(folder))
    with pytest.raises(ValueError, match="has architecture test_vit, and this run test_vit2"):
        begin(init_from=str(folder), backbone="test_vit2")


def test_goes_on_from_an_encoder_with_adapters_beside_it(former, tmp_path):
    model, folder = former
    spec, adapted = begin(init_from=str(folder), adapter="lora")
    assert torch.equal(embed(adapted), embed(model))
    jiggle(adapted)
    encoders.save(tmp_path / "made", adapted, spec, {})
    loaded, _ = encoders.load(tmp_path / "made")
    torch.testing.assert_close(embed(loaded), embed(adapted), rtol=1e-4, atol=1e-5)


def test_goes_on_from_adapters_as_adapters_or_merged(released, tmp_path):
    spec, model = adapt(released)
    jiggle(model)
    encoders.save(tmp_path / "made", model, spec, {})
    folder = {"init_from": str(tmp_path / "made"), "weights": "none"}
    _, again = adapt(released, **folder)
    assert torch.equal(embed(again), embed(model))
    assert sum(it.requires_grad for it in again.parameters()) == 2 * (8 + 3)
    _, merged = adapt(released, **folder, adapter="none")
    torch.testing.assert_close(embed(merged), embed(model), rtol=1e-4, atol=1e-5)
    assert all(it.requires_grad for it in merged.parameters())
    with pytest.raises(ValueError, match=r"rank=3.*rank=4.*merge them first"):
        adapt(released, **folder, lora=LoraParams(4, 6.0, 0.0))


def test_what_it_begins_with_is_part_of_a_runs_key(former, released):
    settings = SimpleNamespace(**vars(SETTINGS))
    assert backbones.inputs(settings) == ()
    settings.weights = str(released)
    first = backbones.inputs(settings)
    save_file({"a": torch.zeros(1)}, released)
    assert backbones.inputs(settings) != first
    settings.init_from = str(former[1])
    assert backbones.inputs(settings) == (encoders.digest_of(former[1]),)


def test_digest_of_weights_leaves_out_what_is_resampled_or_ours():
    _, model = begin()
    before = weights.digest(model)
    with torch.no_grad():
        model.pos_embed += 1
        model.blocks[0].attn.table_k += 1
    assert weights.digest(model) == before
    with torch.no_grad():
        model.norm.bias += 1
    assert weights.digest(model) != before


def test_refuses_to_begin_from_what_dvc_empties(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="init_from is data.pretrain.pretrained: DVC empties"):
        backbones._check_place(Path("data/pretrain/pretrained"))


def test_names_the_setting_where_there_is_no_encoder_to_begin_from(former, tmp_path):
    message = r"params\.yaml: pretrain\.init_from is .*: it must be .* no encoder\.{} in it"
    with pytest.raises(FileNotFoundError, match=message.format("json")):
        begin(init_from=str(tmp_path / "nix"))
    (former[1] / encoders.WEIGHTS).unlink()
    for use in (begin, lambda init_from: backbones.inputs(SimpleNamespace(init_from=init_from))):
        with pytest.raises(FileNotFoundError, match=message.format("safetensors")):
            use(init_from=str(former[1]))
