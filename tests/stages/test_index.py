"""Index: the detector's identity as DVC sees it, in a fraction of a second, without its library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages import index
from stages.common import digests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))


def choose(detector: str, **own: object) -> None:
    """The demo's params with another detector."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["detect"]["detector"] = detector
    values["detect"][detector] |= own
    Path("params.yaml").write_text(yaml.safe_dump(values))


def written() -> dict[str, str]:
    index.main()
    return json.loads(Path("data/index/detector.json").read_text())


def test_other_weights_and_another_library_change_what_dvc_sees(monkeypatch):
    Path("net.pt").write_bytes(b"one")
    choose("instanseg", weights="net.pt")
    first = written()
    assert first["detector"] == "instanseg" and "torch " in first["version"]
    os.utime("net.pt", (1, 1))
    assert written() == first
    Path("net.pt").write_bytes(b"two")
    second = written()
    assert second["version"] != first["version"]
    monkeypatch.setattr("importlib.metadata.version", lambda library: f"of {library}")
    assert "torch of torch" in written()["version"] != second["version"]
    choose("hematoxylin")
    assert "scikit-image of scikit-image" in written()["version"]


def test_weights_are_read_once(monkeypatch):
    Path("net.pt").write_bytes(b"one")
    choose("instanseg", weights="net.pt")
    first = written()
    monkeypatch.setattr(digests.hashlib, "file_digest", None)
    assert written() == first


def test_settings_are_for_dvc_to_see(monkeypatch):
    choose("hematoxylin")
    first = written()
    choose("hematoxylin", merge_um=5.0)
    assert written() == first


def test_missing_weights_are_found_before_any_work():
    choose("instanseg", weights="gone.pt")
    with pytest.raises(FileNotFoundError, match=r"detect.instanseg.weights is gone.pt"):
        index.main()
    assert not Path("data/index/detector.json").exists()


def test_without_the_weights_what_was_pulled_stays(caplog):
    """As on a machine that has the outputs only; another detector's record is no use."""
    caplog.set_level("INFO")
    Path("net.pt").write_bytes(b"one")
    choose("instanseg", weights="net.pt")
    first = written()
    Path("net.pt").unlink()
    assert written() == first and "its version is kept" in caplog.text
    for detector in ("cellvit", "instanseg"):  # another one, and a slip in the path
        choose(detector, weights="gone.pth")
        with pytest.raises(FileNotFoundError, match=rf"detect.{detector}.weights is gone.pth"):
            index.main()


def test_no_network_library_is_imported():
    choose("cellpose")
    code = "import sys; from stages import index; index.main(); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_detect_runs_when_the_identity_changes():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "data/index/detector.json" in stages["detect"]["deps"]
    assert "data/index" not in stages["cohort"]["deps"]  # or other weights would check all slides


def begin(**changes: str) -> dict[str, dict[str, str]]:
    """What DVC sees of the weights that pretraining begins with."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["pretrain"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(values))
    index.main()
    return json.loads(Path("data/index/weights.json").read_text())


def test_weights_to_begin_with_are_seen_when_they_change(caplog):
    caplog.set_level("INFO")
    assert begin() == {
        "weights": {"name": "none", "digest": ""},
        "init_from": {"name": "", "digest": ""},
    }
    Path("net.safetensors").write_bytes(b"one")
    first = begin(weights="net.safetensors")
    Path("net.safetensors").write_bytes(b"two")
    assert begin(weights="net.safetensors")["weights"]["digest"] != first["weights"]["digest"]
    Path("net.safetensors").unlink()
    assert begin(weights="net.safetensors") != first and "its digest is kept" in caplog.text
    with pytest.raises(FileNotFoundError, match="pretrain.weights is other.safetensors"):
        begin(weights="other.safetensors")


def test_an_encoder_to_begin_with_is_seen_when_it_changes():
    Path("mine").mkdir()
    Path("mine/encoder.safetensors").write_bytes(b"one")
    Path("mine/encoder.json").write_text("{}")
    first = begin(init_from="mine")
    assert begin(init_from="mine") == first
    Path("mine/encoder.json").write_text("{ }")
    assert begin(init_from="mine") != first


def test_pretrain_runs_when_those_weights_change():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "data/index/weights.json" in stages["pretrain"]["deps"]
    assert {"pretrain.weights", "pretrain.init_from"} <= set(stages["index"]["params"])
