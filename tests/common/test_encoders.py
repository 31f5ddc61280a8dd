"""Encoders: built by timm, with our attention, saved and loaded without a difference."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stages.common import encoders
from stages.common.encoders import EncoderSpec

SPEC = EncoderSpec(
    architecture="test_vit",
    image_px=40,
    token_px=8,
    sparse_topk=3,
    irpe="qkv",
    mean=(0.5, 0.25, 0.1),
    std=(0.2, 0.3, 0.4),
    patch_px=61,
    mpp=0.5,
)


def changed(**values) -> EncoderSpec:
    return dataclasses.replace(SPEC, **values)


@pytest.fixture
def model():
    """An encoder whose every weight differs from where it began."""
    torch.manual_seed(3)
    model = encoders.build(SPEC).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def images(side: int) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(side))


def test_dense_encoder_without_positions_is_timms():
    ours = encoders.build(changed(sparse_topk=0, irpe="none")).eval()
    theirs = timm.create_model("test_vit", img_size=40, patch_size=8, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images(40)), theirs(images(40)))


def test_sparse_topk_and_irpe_reach_every_block(model):
    for block in model.blocks:
        assert block.attn.topk == 3
        assert block.attn.table_v is not None


def test_output_is_the_class_token_at_any_multiple_of_the_token(model):
    for side in (40, 16, 56):
        with torch.no_grad():
            assert torch.equal(model(images(side)), model.forward_features(images(side))[:, 0])


def test_loaded_encoder_gives_equal_bits(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {"method": "dino"})
    loaded, spec = encoders.load(tmp_path)
    assert spec == SPEC
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images(40)), model(images(40)))


def test_equal_weights_give_equal_bytes(model, tmp_path):
    for name in ("a", "b"):
        encoders.save(tmp_path / name, model, SPEC, {"method": "dino"})
    for name in (encoders.WEIGHTS, encoders.DESCRIPTION):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_digest_follows_weights_and_spec_but_not_provenance(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {"steps": 0})
    before = encoders.digest_of(tmp_path)
    encoders.save(tmp_path, model, SPEC, {"steps": 1})
    assert encoders.digest_of(tmp_path) == before
    encoders.save(tmp_path, model, changed(image_px=48), {})
    assert encoders.digest_of(tmp_path) != before
    with torch.no_grad():
        model.blocks[0].attn.table_k[0, 0, 0] += 1
    encoders.save(tmp_path, model, SPEC, {})
    assert encoders.digest_of(tmp_path) != before


def test_rejects_weights_of_another_run(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    weights = load_file(tmp_path / encoders.WEIGHTS)
    save_file({**weights, "norm.bias": weights["norm.bias"] + 1}, tmp_path / encoders.WEIGHTS)
    with pytest.raises(ValueError, match=r"is not the file that encoder\.json .* describes"):
        encoders.load(tmp_path)


def test_says_which_weights_the_spec_does_not_know(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    edit_spec(tmp_path, irpe="k")
    with pytest.raises(ValueError, match=r"none missing, 12 tensors \(blocks.0.attn.table_q"):
        encoders.load(tmp_path)


def test_says_which_weight_has_another_shape(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    edit_spec(tmp_path, image_px=48)
    with pytest.raises(ValueError, match=r"pos_embed is \[1, 26, 64\] and the spec needs \[1, 37"):
        encoders.load(tmp_path)


def edit_spec(folder, **values) -> None:
    described = json.loads((folder / encoders.DESCRIPTION).read_text())
    described["spec"].update(values)
    described["timm"].update(img_size=values.get("image_px", 40))
    (folder / encoders.DESCRIPTION).write_text(json.dumps(described))


def test_says_what_to_run_where_there_is_no_encoder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="run `dvc repro pretrain`"):
        encoders.load(tmp_path)
    encoders.save(tmp_path, model, SPEC, {})
    (tmp_path / encoders.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder\.safetensors: run"):
        encoders.load(tmp_path)


def test_rejects_an_architecture_that_timm_lacks():
    with pytest.raises(ValueError, match="vit_tinny.* or ResNet of timm: .* vit_tiny_patch16"):
        encoders.build(changed(architecture="vit_tinny_patch16_224"))
    with pytest.raises(ValueError, match="no weights called test_vit.best: .* test_vit.r160_in1k"):
        encoders.build(changed(architecture="test_vit.best"))


def test_rejects_an_image_that_tokens_do_not_fill():
    with pytest.raises(ValueError, match="image of 41 px is no whole number of tokens of 8 px"):
        encoders.build(changed(image_px=41))


def test_prepare_only_normalises_what_has_the_right_side():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    got = encoders.prepare(torch.from_numpy(pixels), SPEC)
    wanted = (pixels / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    np.testing.assert_allclose(got.permute(0, 2, 3, 1), wanted, rtol=0, atol=1e-5)


def test_prepare_shrinks_without_aliasing():
    checks = np.indices((80, 80)).sum(0) % 2 * 255
    pixels = torch.from_numpy(np.repeat(checks[None, ..., None], 3, -1).astype(np.uint8))
    plain = changed(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    inner = encoders.prepare(pixels, plain)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), rtol=0, atol=1e-3)


def test_descriptions_of_before_adapters_load(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    path = tmp_path / encoders.DESCRIPTION
    described = json.loads(path.read_text())
    del described["spec"]["lora"]
    kept = {name: described[name] for name in ("spec", "provenance", "weights")}
    path.write_text(json.dumps(kept))
    loaded, spec = encoders.load(tmp_path)
    assert spec == SPEC
    assert torch.equal(loaded.norm.bias, model.norm.bias)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "encoder.json is not JSON: "),
        ("[" * 100_000, "encoder.json is not JSON: "),
        ("[]", "encoder.json holds no map"),
        (" " * 2**20 + "{}", "has more than 1048576 bytes"),
        ("{}", "encoder.json has no spec"),
    ],
)
def test_rejects_what_is_no_description(model, tmp_path, text, message):
    encoders.save(tmp_path, model, SPEC, {})
    (tmp_path / encoders.DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match=message):
        encoders.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "hf_hub:somebody/something"}, "no vision transformer or ResNet of timm"),
        ({"architecture": "local-dir:/tmp/there"}, "no vision transformer or ResNet of timm"),
        ({"image_px": 10**12}, "image_px is 1000000000000: it must be from 1 to 16384"),
        ({"token_px": -8}, "token_px is -8: it must be 1 or more, or 0 for a ResNet"),
        ({"irpe": "q"}, "irpe is q: it must be one of none, k, qk, qkv"),
        ({"std": [0.1, 0.0, 0.1]}, r"std is \(0.1, 0.0, 0.1\): it must be above 0"),
        ({"mpp": 0}, "mpp is 0.0: it must be above 0"),
        ({"sparse_topk": "3"}, r"spec.sparse_topk is '3' \(str\): it must be int"),
        ({"depth": 100}, "spec.depth is unknown"),
    ],
)
def test_rejects_a_description_of_what_no_encoder_is(model, tmp_path, values, message):
    encoders.save(tmp_path, model, SPEC, {})
    edit_spec(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        encoders.load(tmp_path)


def test_says_when_arguments_and_spec_differ(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    path = tmp_path / encoders.DESCRIPTION
    path.write_text(
        path.read_text().replace('"model_name": "test_vit"', '"model_name": "test_vit2"')
    )
    with pytest.raises(ValueError, match="timm is not what spec says"):
        encoders.load(tmp_path)


def test_a_large_description_takes_no_memory_that_the_file_does_not_fill(model, tmp_path):
    encoders.save(tmp_path, model, SPEC, {})
    path = tmp_path / encoders.DESCRIPTION
    described = json.loads(path.read_text())
    described["spec"].update(architecture="vit_giant_patch14_dinov2", image_px=16000)
    del described["timm"]
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="tensors .* missing"):
        encoders.load(tmp_path)
