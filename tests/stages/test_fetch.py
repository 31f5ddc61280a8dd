"""Fetch: released weights and encoders of other runs become encoders like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from stages import fetch, index
from stages.common import architectures, encoders

ROOT = Path(__file__).resolve().parents[2]
RELEASED = {"weights": "net.safetensors", "token_px": 0, "global_px": 40}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))


def describe(**entries: object) -> None:
    """The demo's params with these encoders from elsewhere."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["fetch"]["encoders"] = entries
    values["embed"]["encoders"] = ["untrained", *entries]
    Path("params.yaml").write_text(yaml.safe_dump(values))


def a_release(architecture: str, **how: object) -> torch.nn.Module:
    """A network of timm's with its classifier, as it is released; its weights in a file."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **how).eval()
    save_file(model.state_dict(), "net.safetensors")
    return model


def fetched(name: str) -> Path:
    fetch.main(name, Path("data/pretrain") / name)
    return Path("data/pretrain") / name


def images(px: int) -> torch.Tensor:
    return torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(1))


def test_a_released_resnet_embeds_as_timm_does():
    released = a_release("resnet10t")
    describe(resnet={**RELEASED, "backbone": "resnet10t"})
    model, spec = encoders.load(fetched("resnet"))
    with torch.no_grad():
        wanted = released.forward_head(released.forward_features(images(40)), pre_logits=True)
        torch.testing.assert_close(model(images(40)), wanted)
    assert (spec.patch_px, spec.mpp, spec.sparse_topk, spec.irpe) == (128, 0.5, 0, "none")
    assert (spec.mean, spec.std) == architectures.normalisation("resnet10t", released=True)


def test_a_released_transformer_embeds_as_timm_does():
    released = a_release("test_vit", img_size=40)
    describe(vit={**RELEASED, "backbone": "test_vit", "token_px": 16, "global_px": 48})
    model, _ = encoders.load(fetched("vit"))
    released.set_input_size((48, 48))
    with torch.no_grad():
        wanted = released.forward_features(images(48))[:, 0]
        torch.testing.assert_close(model(images(48)), wanted, rtol=1e-4, atol=1e-4)


def test_tells_where_the_weights_are_from(monkeypatch):
    found = a_release("resnet10t").state_dict()
    monkeypatch.setattr(architectures, "load_state_dict_from_hf", lambda _: found)
    describe(hub={**RELEASED, "backbone": "resnet10t", "weights": "timm"})
    described = encoders.describe(fetched("hub"))
    assert described["base"].weights == "timm"
    assert described["licence"]["base_weights"] == architectures.licence("resnet10t")


def test_without_a_network_says_what_to_do(monkeypatch):
    def refuse(_):
        raise OSError("no route to host")

    monkeypatch.setattr(architectures, "load_state_dict_from_hf", refuse)
    describe(hub={**RELEASED, "backbone": "resnet10t", "weights": "timm"})
    with pytest.raises(OSError, match="no route to host .* set `weights` to its path"):
        fetched("hub")
    assert not Path("data/pretrain/hub").exists()


def an_encoder(folder: Path) -> None:
    spec = encoders.EncoderSpec("test_vit", 24, 8, 3, "qkv", encoders.MEAN, encoders.STD, 31, 0.5)
    encoders.save(folder, encoders.build(spec), spec, {})


def test_an_encoder_of_another_run_stays_as_it_is():
    an_encoder(Path("encoders/earlier"))
    Path("encoders/earlier/MODEL_CARD.md").write_text("of another run")
    Path("encoders/earlier/notes.txt").write_text("not for the pipeline")
    describe(earlier="encoders/earlier")
    folder = fetched("earlier")
    assert sorted(file.name for file in folder.iterdir()) == sorted(fetch.FILES)
    assert encoders.digest_of(folder) == encoders.digest_of(Path("encoders/earlier"))
    one, other = (encoders.load(path)[0] for path in (folder, Path("encoders/earlier")))
    with torch.no_grad():
        np.testing.assert_array_equal(one(images(24)), other(images(24)))


def test_refuses_what_is_no_encoder():
    an_encoder(Path("broken"))
    (Path("broken") / encoders.WEIGHTS).write_bytes(b"other weights")
    describe(
        broken="broken",
        absent="nowhere",
        none={**RELEASED, "backbone": "resnet10t", "weights": "none"},
        odd={**RELEASED, "backbone": "resnet10t", "layers": 3},
    )
    for name, message in (
        ("broken", "is not the file that encoder.json beside it describes"),
        ("absent", "no nowhere/encoder.json"),
        ("none", "weights is none: it must be timm or the path"),
        ("odd", r"fetch\.encoders\.odd\.layers is unknown"),
        ("gone", "fetch.encoders has no gone, only absent, broken, none, odd"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fetched(name)


def seen(name: str) -> dict[str, str]:
    index.main()
    return json.loads(Path(f"data/index/encoders/{name}.json").read_text())


def test_dvc_sees_weights_that_change(caplog):
    caplog.set_level("INFO")
    Path("net.safetensors").write_bytes(b"one")
    describe(net={**RELEASED, "backbone": "resnet10t"}, hub={**RELEASED, "weights": "timm"})
    assert seen("hub") == {"name": "timm", "digest": ""}
    first = seen("net")
    assert seen("net") == first
    Path("net.safetensors").write_bytes(b"two")
    second = seen("net")
    assert second["digest"] != first["digest"]
    Path("net.safetensors").unlink()
    assert seen("net") == second and "its digest is kept" in caplog.text
    describe()
    index.main()
    assert not list(Path("data/index/encoders").iterdir())
    describe(net={**RELEASED, "weights": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"fetch\.encoders\.net\.weights is gone\.safet"):
        index.main()


def test_dvc_sees_an_encoder_that_changes():
    an_encoder(Path("mine"))
    describe(mine="mine")
    first = seen("mine")
    with (Path("mine") / encoders.DESCRIPTION).open("a") as file:
        file.write("\n")
    assert seen("mine") != first


@pytest.mark.parametrize("name", ["pretrained", "dvclive", "metrics.json", "../out", "a b"])
def test_refuses_names_that_are_taken_or_no_folder(name):
    describe(**{name: "anywhere"})
    with pytest.raises(ValueError, match="fetch.encoders names an encoder"):
        index.main()


def test_each_encoder_has_a_folder_of_its_own():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    own = set(stages["pretrain"]["outs"])
    assert "data/pretrain" not in own
    assert {f"data/pretrain/{name}" for name in index.ENCODERS} <= own
    assert stages["fetch"]["do"]["outs"] == ["data/pretrain/${key}"]
    assert "fetch" in stages["index"]["params"]
