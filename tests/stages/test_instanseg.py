"""InstanSeg: the file and its digest, scale, batches; real nuclei with the published weights."""

import hashlib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks import detection
from stages.common import plugins
from stages.detectors import Detection, _score, instanseg
from tests.conftest import SHARED

WEIGHTS = SHARED / "weights" / "instanseg_brightfield_nuclei" / "instanseg.pt"
PARAMS = instanseg.Params(
    weights=str(WEIGHTS), sha256="", seed_threshold=0.7, min_radius_um=1.8, device="cpu"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where digests are remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CYTOSSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def detector():
    if not WEIGHTS.is_file():
        pytest.skip("no instanseg.pt in shared/data beside the repository")
    return instanseg.build(PARAMS)


@pytest.fixture(scope="module")
def field(detector) -> tuple[np.ndarray, np.ndarray]:
    """A real field and its annotated nuclei."""
    return next(iter(detection.lbc_nuclei(SHARED, begin=1)))


def same(first: Detection, second: Detection) -> bool:
    names = ("centroid_px", "radius_um", "score")
    arrays = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)
    return arrays and all(map(np.array_equal, first.outline_px, second.outline_px))


class Threshold(torch.nn.Module):
    """Stands in for the network: columns of dark stripes are nuclei 1, 2, ... by their place."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.pixel_size: float = 0.5
        self.cells_and_nuclei: bool = both

    def forward(self, x: torch.Tensor, seed_threshold: float) -> torch.Tensor:
        dark = (x.mean(dim=1, keepdim=True) < seed_threshold).float()
        column = torch.arange(x.shape[3]).expand(x.shape[2:])
        return dark * (1 + column // 32).float()


class Grid(torch.nn.Module):
    """Stands in for the network: what is dark in each square of 11 pixels is one nucleus."""

    pixel_size: float
    cells_and_nuclei: bool

    def __init__(self) -> None:
        super().__init__()
        self.pixel_size = 0.5
        self.cells_and_nuclei = False

    def forward(self, x: torch.Tensor, seed_threshold: float) -> torch.Tensor:
        dark = (x.mean(dim=1, keepdim=True) < seed_threshold).float()
        row = torch.arange(x.shape[2])[:, None] // 11
        return dark * (1 + 100 * row + torch.arange(x.shape[3]) // 11).float()


def saved(folder: Path, network: torch.nn.Module) -> instanseg.Params:
    with pytest.warns(match="torch.jit"):
        torch.jit.save(torch.jit.script(network), folder / "net.pt")
    digest = hashlib.sha256((folder / "net.pt").read_bytes()).hexdigest()
    return replace(PARAMS, weights=str(folder / "net.pt"), sha256=digest, seed_threshold=0.5)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.77])
def test_maps_what_it_finds_back_to_the_patch(tmp_path, mpp):
    """Squares of 8 um with known centres, whatever the patch's scale."""
    build = instanseg.build(saved(tmp_path, Threshold()))
    patch = np.full((round(37 / mpp), round(61 / mpp), 3), 240, np.uint8)
    centres = np.array([[9.0, 10.0], [24.0, 21.0], [54.0, 12.0]])  # microns
    for x, y in centres:
        box = [slice(round((at - 4) / mpp), round((at + 4) / mpp)) for at in (y, x)]
        patch[tuple(box)] = 30
    nuclei = build(patch[None], mpp)[0]
    assert np.abs(nuclei.centroid_px * mpp - centres).max() < 0.6 * max(mpp, 0.5)
    assert nuclei.radius_um == pytest.approx(np.sqrt(64 / np.pi), abs=0.4)
    for outline, centre in zip(nuclei.outline_px, centres, strict=True):
        assert np.abs(outline.min(axis=0) * mpp - (centre - 4)).max() < 1.2 * max(mpp, 0.5)
        assert np.abs(outline.max(axis=0) * mpp - (centre + 4)).max() < 1.2 * max(mpp, 0.5)
    assert (nuclei.score == 1).all()  # the script gives none


def test_drops_what_is_smaller_than_a_nucleus(tmp_path):
    params = saved(tmp_path, Threshold())
    patch = np.full((64, 64, 3), 240, np.uint8)
    patch[10:22, 8:20], patch[40:43, 40:43] = 30, 30
    assert len(instanseg.build(params)(patch[None], 0.5)[0].score) == 1
    assert len(instanseg.build(replace(params, min_radius_um=0.0))(patch[None], 0.5)[0].score) == 2


def test_measures_thousands(tmp_path):
    patch = np.full((803, 803, 3), 240, np.uint8)
    for at in np.ndindex(71, 71):
        cv2.circle(patch, (at[0] * 11 + 5, at[1] * 11 + 5), 4, (60, 50, 110), -1)
    nuclei = instanseg.build(saved(tmp_path, Grid()))(patch[None], 0.5)[0]
    assert len(nuclei.score) == len(nuclei.outline_px) == 71**2
    assert np.abs((nuclei.centroid_px - 5.5) / 11 % 1).max() < 0.01
    assert nuclei.radius_um == pytest.approx(4.1 * 0.5, abs=0.2)


def test_says_where_to_get_missing_weights(tmp_path):
    message = rf"instanseg.weights is .*gone.*get it from https.* sha256 is {instanseg.PUBLISHED}"
    with pytest.raises(FileNotFoundError, match=message):
        instanseg.build(replace(PARAMS, weights=str(tmp_path / "gone")))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" * 40])
def test_refuses_weights_of_another_digest(tmp_path, content):
    """Before anything of the file is run: TorchScript is code."""
    (tmp_path / "net.pt").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    message = rf"net\.pt \(sha256 {digest}\) must have sha256 {instanseg.PUBLISHED}.*https"
    with pytest.raises(ValueError, match=message):
        instanseg.build(replace(PARAMS, weights=str(tmp_path / "net.pt")))


def test_published_weights_cut_short_are_refused(detector, tmp_path):
    (tmp_path / "net.pt").write_bytes(WEIGHTS.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"\(sha256 [0-9a-f]{64}\) must have .* it is damaged"):
        instanseg.build(replace(PARAMS, weights=str(tmp_path / "net.pt")))


def test_trusted_weights_that_are_none_are_named_with_their_digest(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"PK\x03\x04" * 40)
    digest = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    params = replace(PARAMS, weights=str(tmp_path / "net.pt"), sha256=digest.upper())
    with pytest.raises(ValueError, match=rf"sha256 {digest}\) is no TorchScript file \(.*https"):
        instanseg.build(params)


def test_refuses_a_model_of_cells_and_nuclei_before_any_patch(tmp_path):
    params = saved(tmp_path, Threshold(both=True))
    with pytest.raises(ValueError, match="is no InstanSeg model of nuclei alone; get .*https"):
        instanseg.build(params)


def test_refuses_patches_that_are_too_coarse(tmp_path):
    """A wrong mpp must not enlarge a patch beyond all memory."""
    build = instanseg.build(saved(tmp_path, Threshold()))
    patch = np.full((1, 31, 37, 3), 240, np.uint8)
    assert len(build(patch, 2.0)) == 1
    with pytest.raises(ValueError, match=r"mpp of the patches is 40, .* 80 times .* 2 or less"):
        build(patch, 40.0)


def test_equal_weights_have_one_identity_wherever_they_lie(tmp_path):
    params = saved(tmp_path, Threshold())
    first = instanseg.identity(params)
    assert first == instanseg.build(params).version and params.sha256 in first
    assert f"torch {metadata.version('torch')}" in first
    (tmp_path / "moved.pt").write_bytes((tmp_path / "net.pt").read_bytes())
    assert instanseg.identity(replace(params, weights=str(tmp_path / "moved.pt"))) == first
    (tmp_path / "net.pt").write_bytes(b"other")
    assert instanseg.identity(params) != first


def test_rejects_params_that_find_nothing():
    with pytest.raises(ValueError, match="sha256 is 'abc': it must be 64 hex digits, or empty"):
        replace(PARAMS, sha256="abc")
    with pytest.raises(ValueError, match="seed_threshold is 1.0: it must be above 0 and below 1"):
        replace(PARAMS, seed_threshold=1.0)
    with pytest.raises(ValueError, match="min_radius_um is -1.0: it must be 0 or more"):
        replace(PARAMS, min_radius_um=-1.0)


def test_version_holds_the_digest_and_the_plug_in_is_found(detector):
    assert detector.version.endswith(instanseg.PUBLISHED) and detector.device == "cpu"
    assert plugins.load("detectors", "instanseg").Params is instanseg.Params


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 9, 9), np.uint8), ((2, 9, 9, 4), np.uint8), ((2, 9, 9, 3), np.uint16)],
    ids=["gray", "RGBA", "16 bits"],
)
def test_rejects_all_but_stacks_of_uint8_rgb(detector, shape, dtype):
    with pytest.raises(ValueError, match="patches are .* must be uint8 .*RGB.*drop alpha"):
        detector(np.zeros(shape, dtype), 0.5)
    with pytest.raises(ValueError, match="mpp is 0.* above 0"):
        detector(np.zeros((1, 9, 9, 3), np.uint8), 0.0)


def test_finds_nothing_in_blank_dark_noisy_and_tiny_patches(detector):
    noise = np.random.default_rng(0).normal(230, 4, (131, 131, 3)).clip(0, 255).astype(np.uint8)
    plain = [np.full((131, 131, 3), gray, np.uint8) for gray in (0, 128, 255)]
    for nuclei in detector(np.stack([*plain, noise]), 0.5):
        assert nuclei.centroid_px.shape == (0, 2) and nuclei.outline_px == []
    assert len(detector(np.full((1, 3, 5, 3), 200, np.uint8), 0.5)[0].score) == 0
    assert detector(np.empty((0, 9, 9, 3), np.uint8), 0.5) == []


def test_a_batch_is_as_each_patch_alone(detector, field):
    image, _ = field
    patches = np.stack([image[at : at + 131, at : at + 131] for at in (40, 90, 200)])
    together = detector(patches, 0.8)
    assert sum(len(nuclei.score) for nuclei in together) > 10
    for patch, nuclei in zip(patches, together, strict=True):
        assert same(detector(patch[None], 0.8)[0], nuclei)


def test_finds_a_lonely_nucleus(detector, field):
    """A real nucleus on nothing but its own ground."""
    image, _ = field
    nuclei = detector(image[None, :200, :200], 0.8)[0]
    x, y = np.median(nuclei.centroid_px, axis=0)
    at = np.hypot(*(nuclei.centroid_px - (x, y)).T).argmin()
    mask = cv2.fillPoly(
        np.zeros((200, 200), np.uint8), [nuclei.outline_px[at].round().astype(int)], 1
    )
    mask = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    rows, columns = np.nonzero(mask)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    ground = np.median(image[:200, :200][cv2.dilate(mask, np.ones((15, 15))) == 0], axis=0)
    cut = np.where(mask[box][..., None] > 0, image[:200, :200][box], ground).astype(np.uint8)
    lonely = np.full((161, 161, 3), ground, np.uint8)
    lonely[60 : 60 + cut.shape[0], 50 : 50 + cut.shape[1]] = cut
    assert len(detector(lonely[None], 0.8)[0].score) == 1


def test_finds_nuclei_of_real_liquid_cytology(detector, field):
    image, points = field
    nuclei = detector(image[None], detection.LBC_MPP)[0]
    counts = _score.match(nuclei.centroid_px.astype(float), points, detection.LBC_RADIUS_PX)
    assert counts.annotated == 57 and counts.recall > 0.9 and counts.f1 > 0.65
