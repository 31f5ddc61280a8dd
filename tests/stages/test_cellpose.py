"""Cellpose: weights and their damage, scale, and its own dynamics around a known flow."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.detectors import cellpose
from tests.stages.test_detectors import smear

cellpose_models = pytest.importorskip("cellpose.models", reason="cellpose is an extra")
CELLPOSE = cellpose.Params(
    weights="cpsam",
    diameter_um=8.0,
    flow_threshold=0.4,
    cellprob_threshold=0.0,
    batch_tiles=3,
    device="cpu",
)
quiet = pytest.mark.filterwarnings("ignore")  # what torch and cellpose say of themselves


@pytest.fixture(autouse=True)
def quietly(tmp_path, monkeypatch):
    """One thread; digests are remembered in a folder of the test."""
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class PerfectNet(torch.nn.Module):
    """Stands in for the transformer: flows of the bright disc in each 256 px tile."""

    nout, dtype = 3, torch.float32

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.W2 = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    def device(self):
        return self.W2.device

    def load_model(self, path, device):
        torch.load(path, map_location=device, weights_only=True)

    def forward(self, x):
        bright = x.mean(dim=1) > 0.5
        rows, columns = (axis.float() for axis in torch.meshgrid(*[torch.arange(256)] * 2))
        out = torch.zeros(len(x), 3, 256, 256)
        for at, mask in enumerate(bright):
            away = torch.stack([rows - rows[mask].mean(), columns - columns[mask].mean()])
            unit = away / away.norm(dim=0).clamp(min=1)
            out[at, :2] = -5 * unit * mask
            out[at, 2] = torch.where(mask, 2.0, -6.0)
        return out, torch.zeros(len(x), 256)


@pytest.fixture
def perfect(tmp_path, monkeypatch) -> cellpose.Params:
    monkeypatch.setattr(cellpose_models, "CPSAM", PerfectNet)
    torch.save({"W2": torch.zeros(1)}, tmp_path / "net")
    return replace(CELLPOSE, weights=str(tmp_path / "net"))


LIT = {"colour": (250, 250, 250), "background": (10, 10, 10)}  # as the tiles' padding is dark


@quiet
def test_cellpose_turns_masks_into_nuclei(perfect):
    """Cellpose's own tiling, resizing and dynamics, between a known flow and our units."""
    discs = [(20.0, 35.5, 4.0), (40.25, 22.0, 3.4)]
    patches = np.stack([smear([disc], 0.25, **LIT) for disc in discs])
    for (x, y, radius), nuclei in zip(discs, cellpose.build(perfect)(patches, 0.25), strict=True):
        assert np.abs(nuclei.centroid_px * 0.25 - (x, y)).max() < 0.25
        assert nuclei.radius_um == pytest.approx(radius, abs=0.3)
        assert nuclei.score == pytest.approx(1 / (1 + np.exp(-2)), abs=0.05)
        around = np.hypot(*(nuclei.outline_px[0] * 0.25 - (x, y)).T)
        assert around == pytest.approx(radius, abs=0.5)


@quiet
def test_cellpose_takes_one_patch_and_none(perfect):
    detector = cellpose.build(perfect)
    assert detector(np.empty((0, 9, 9, 3), np.uint8), 0.25) == []
    assert len(detector(smear([(30.0, 30.0, 4.0)], 0.5, **LIT)[None], 0.5)[0].score) == 1


@quiet
def test_version_follows_the_content_of_the_weights(perfect, tmp_path):
    first = cellpose.build(perfect).version
    torch.save({"W2": torch.zeros(1)}, tmp_path / "copy")
    torch.save({"W2": torch.ones(1)}, tmp_path / "net")
    assert cellpose.build(perfect).version != first
    (tmp_path / "net").write_bytes((tmp_path / "copy").read_bytes())
    moved = replace(perfect, weights=str(tmp_path / "copy"))
    assert cellpose.build(moved).version == cellpose.build(perfect).version


@quiet
def test_fewer_tiles_at_once_where_memory_runs_out(perfect, monkeypatch, caplog):
    """The patches at once are no help: tiles of them all are run, so many at a time."""
    detector = cellpose.build(replace(perfect, batch_tiles=16))
    original, tried = detector._network.eval, []

    def small(*given, batch_size, **more):
        tried.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*given, batch_size=batch_size, **more)

    monkeypatch.setattr(detector._network, "eval", small)
    for _ in range(2):
        detector(smear([], 0.5)[None], 0.5)
    assert tried == [16, 8, 4, 4]
    (said,) = [one.getMessage() for one in caplog.records if one.name == cellpose.__name__]
    assert "16 tiles" in said and "going on with 4; set detect.cellpose.batch_tiles" in said


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty"), (b"not weights", "text"), (b"PK\x03\x04" * 40, "cut zip")]
)
def test_names_damaged_weights_and_their_digest(tmp_path, content, why):
    (tmp_path / "net").write_bytes(content)
    with pytest.raises(ValueError, match=r"net \(sha256 [0-9a-f]{64}\) holds no weights"):
        cellpose.build(replace(CELLPOSE, weights=str(tmp_path / "net")))


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {3: torch.zeros(1)}])
def test_names_files_that_hold_no_named_weights(tmp_path, content):
    torch.save(content, tmp_path / "net")
    kind = type(content).__name__
    with pytest.raises(ValueError, match=rf"\(sha256 .*\) holds no weights by name but a {kind}"):
        cellpose.build(replace(CELLPOSE, weights=str(tmp_path / "net")))


def test_refuses_to_run_code_in_weights(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"W2": Trap()}, tmp_path / "net")
    with pytest.raises(ValueError, match="holds no weights"):
        cellpose.build(replace(CELLPOSE, weights=str(tmp_path / "net")))
    assert not (tmp_path / "sprung").exists()


@quiet
def test_refuses_weights_that_are_not_all_there(perfect, monkeypatch):
    class Larger(PerfectNet):
        def __init__(self, dtype=torch.float32):
            super().__init__()
            self.out = torch.nn.Linear(2, 3)

    monkeypatch.setattr(cellpose_models, "CPSAM", Larger)
    with pytest.raises(ValueError, match=r"\(sha256 .*\) lacks out.bias and 1 more .* set detect"):
        cellpose.build(perfect)(smear([], 0.5)[None], 0.5)


def test_says_where_to_get_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights is .*gone: .*cpsam.* get the file"):
        cellpose.build(replace(CELLPOSE, weights=str(tmp_path / "gone")))


def test_says_what_to_do_without_a_network(monkeypatch):
    def unreachable(name):
        raise OSError("Name or service not known")

    monkeypatch.setattr(cellpose_models, "cache_model_path", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cpsam cannot be fetched \(Name.*huggingface.*"):
        cellpose.build(CELLPOSE)


def test_says_what_to_install_without_cellpose(monkeypatch):
    monkeypatch.setitem(sys.modules, "cellpose", None)
    with pytest.raises(ImportError, match=r"cytossl\[cellpose\].*detect.detector to hematoxylin"):
        cellpose.build(CELLPOSE)


def test_names_the_release_that_older_weights_need(shared_data):
    file = shared_data / "weights" / "cellpose_cyto_scellseg_torch"
    with pytest.raises(ImportError, match=r"no network for those of cellpose 1 to 3: .*cellpose<4"):
        cellpose.build(replace(CELLPOSE, weights=str(file)))


def test_rejects_cellpose_params_that_find_nothing(perfect):
    with pytest.raises(ValueError, match="diameter_um is 0.0: it must be above 0"):
        replace(CELLPOSE, diameter_um=0.0)
    with pytest.raises(ValueError, match="batch_tiles is 0: it must be 1 or more"):
        replace(CELLPOSE, batch_tiles=0)
    for value in (float("nan"), float("inf")):
        for name in ("flow_threshold", "cellprob_threshold"):
            with pytest.raises(ValueError, match=f"{name} is {value}: it must be"):
                replace(CELLPOSE, **{name: value})


def test_cellpose_refuses_patches_that_are_too_coarse(perfect):
    """Of 8 um, 30 px to the network: 0.267 microns a pixel."""
    with pytest.raises(ValueError, match=r"mpp of the patches is 2, .* 7.5 times .* 1.07 or less"):
        cellpose.build(perfect)(smear([], 0.5)[None], 2.0)


def test_identity_is_the_version_and_a_name_until_weights_are_fetched(perfect, monkeypatch):
    assert cellpose.identity(perfect) == cellpose.build(perfect).version
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(Path(perfect.weights).parent))
    named = replace(perfect, weights="net")
    assert cellpose.identity(named) == cellpose.identity(perfect)
    assert cellpose.identity(CELLPOSE).endswith("cpsam not fetched")
    for path in ("weights/gone", "gone.pth"):
        with pytest.raises(FileNotFoundError, match=f"weights is {path}, and there is no such"):
            cellpose.identity(replace(CELLPOSE, weights=path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@quiet
def test_rejects_a_device_that_is_not_there(perfect):
    with pytest.raises(ValueError, match="device is cuda, and there is none: set it to auto"):
        cellpose.build(replace(perfect, device="cuda"))(smear([], 0.5)[None], 0.5)
