"""CellViT: names and shapes of the released weights, seams between nuclei, scales and errors."""

import hashlib
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from stages.common import plugins
from stages.detectors import _cellvit_cells, _cellvit_encoders, _cellvit_network, _spans, cellvit

# Sha256 of lines "name [shape]", sorted: what the network classes of the package cellvit 1.0.9 hold
# (CellViT256(None, 6, 19), CellViTSAM(None, 6, 19, backbone)), less what nothing here reads.
UNREAD = re.compile(r"nuclei_type_maps_decoder|classifier_head|encoder\.(head|norm|neck)\b")
RELEASED = {
    "ViT256": "d9c4ba9d19dffecd09c8cdf18afc3e0687ab8bfdbb8c1284ab9ed2abd3fd72d2",
    "SAM-B": "f8c61ec89a5b618e1856858839b10647ba04303f7b07b35ce0789a02fd1ebb0d",
    "SAM-L": "bb96808373b60855d8b1fc9f7db4d19b4e32149bf951d3a763051db3bf8a459e",
    "SAM-H": "7600b60a26802300582bf21e3b0dbd3a6db8b2608598b23eb3305435b9a40ec3",
}
PLAIN = _cellvit_encoders.Sizes(16, 4, 2, (1, 2, 3, 4), (8, 6), (10, 8, 6, 4), 3, 0)
WINDOWED = _cellvit_encoders.Sizes(16, 5, 2, (1, 2, 3, 5), (8, 6), (10, 8, 6, 4), 64, 3, (1, 4))
CONFIG = {
    "model.backbone": "ViT256",
    "training.mixed_precision": True,
    "transformations.normalize.mean": [0.5, 0.5, 0.5],
    "transformations.normalize.std": [0.5, 0.5, 0.5],
}
BACKGROUND, NUCLEUS = 230, 60


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


def offsets(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ideal maps of labelled nuclei, as HoVer-Net defines them: -1 to 1 across each."""
    maps = np.zeros((2, *numbers.shape), np.float32)
    for number in range(1, numbers.max() + 1):
        where = np.nonzero(numbers == number)
        for axis, place in enumerate(where[::-1]):
            away = place - place.mean()
            maps[axis][where] = away / max(1e-6, np.abs(away).max())
    return maps[0], maps[1]


def numbered(discs: list[tuple[int, int, int]], shape: tuple[int, int]) -> np.ndarray:
    """Discs (x, y, radius); where two overlap, each pixel belongs to the nearer centre."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    depth = np.stack([r - np.hypot(x - cx, y - cy) for cx, cy, r in discs])
    return np.where(depth.max(axis=0) > 0, depth.argmax(axis=0) + 1, 0)


def centres(labels: np.ndarray) -> np.ndarray:
    return np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, labels.max() + 1)))


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that let every part matter and no signal fade; norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            fan_in = value[0].numel() if value.ndim > 1 and "_" not in name.split(".")[-1] else 50
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
            if name.endswith("running_var") or value.ndim == 1 and name.endswith("weight"):
                value.abs_().add_(0.5)
    return network.eval()


# the network


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def released(name: str) -> nn.Module:
    with torch.device("meta"):
        return _cellvit_network.CellViT(_cellvit_encoders.RELEASED[name])


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_weights(name):
    assert fingerprint(released(name).state_dict()) == RELEASED[name]


def test_weights_are_named_as_in_the_files():
    """Some spelled out, for who reads a file: encoder, shared skip, branch."""
    state = released("ViT256").state_dict()
    assert len(state) == 362
    shapes = {
        "encoder.pos_embed": [1, 197, 384],
        "encoder.blocks.11.attn.qkv.weight": [1152, 384],
        "encoder.blocks.0.mlp.fc2.bias": [384],
        "decoder1.2.block.1.weight": [128, 128, 3, 3],
        "hv_map_decoder.decoder3_upsampler.0.block.0.weight": [312, 624, 3, 3],
        "nuclei_binary_map_decoder.decoder0_header.2.weight": [2, 64, 1, 1],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("sizes", [PLAIN, WINDOWED], ids=["ViT-256", "SAM"])
def test_a_pixel_changes_far_ones_through_the_encoder_only(sizes):
    network = randomised(_cellvit_network.CellViT(sizes))
    image = torch.randn(1, 3, 80, 80)
    changed = image.clone()
    changed[..., 3, 5] += 3
    with torch.inference_mode():
        before, after = network(image), network(changed)
        assert [list(one.shape) for one in before] == [[1, 2, 80, 80]] * 2
        assert all(
            (a - b)[..., 60:, 60:].abs().max() > 0 for a, b in zip(before, after, strict=True)
        )
        for weight in network.encoder.patch_embed.parameters():
            weight.zero_()
        before, after = network(image), network(changed)
    assert all((a - b)[..., 60:, 60:].abs().max() == 0 for a, b in zip(before, after, strict=True))
    assert all((a - b)[..., :9, :9].abs().max() > 0 for a, b in zip(before, after, strict=True))


def naive_attention(attention: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """As Segment Anything's paper has it, pair by pair: one image, one head at a time."""
    side = int(len(tokens) ** 0.5)
    dim = tokens.shape[1]
    per_head = dim // attention.heads
    joint = attention.qkv(tokens).reshape(len(tokens), 3, attention.heads, per_head)
    heads = []
    for head in range(attention.heads):
        query, key, value = joint[:, :, head].unbind(1)
        logits = query @ key.T / per_head**0.5
        for i in range(len(tokens)):
            for j in range(len(tokens)):
                rows, columns = i // side - j // side, i % side - j % side
                logits[i, j] += query[i] @ attention.rel_pos_h[rows + side - 1]
                logits[i, j] += query[i] @ attention.rel_pos_w[columns + side - 1]
        heads.append(logits.softmax(dim=1) @ value)
    return attention.proj(torch.cat(heads, dim=1))


def test_windows_attend_within_themselves_by_distance():
    block = randomised(_cellvit_encoders._WindowedBlock(WINDOWED, 3))
    tokens = torch.randn(1, 5, 5, 16)
    with torch.inference_mode():
        found = block._attend(tokens)
        filled = nn.functional.pad(tokens, (0, 0, 0, 1, 0, 1))
        window = filled[0, 3:, :3].reshape(9, 16)
        expected = naive_attention(block.attn, window).reshape(3, 3, 16)[:2]
    assert torch.allclose(found[0, 3:, :3], expected, atol=1e-5)


# against the authors' own code, where it is installed


def theirs(name: str) -> nn.Module:
    models = "cellvit.models.cell_segmentation"
    why = "the package cellvit cannot be installed beside NumPy 2 but by `pip install --no-deps`"
    if name == "ViT256":
        module = pytest.importorskip(f"{models}.cellvit_256", reason=why, exc_type=ImportError)
        return module.CellViT256(None, 6, 19)
    module = pytest.importorskip(f"{models}.cellvit_sam", reason=why, exc_type=ImportError)
    return module.CellViTSAM(None, 6, 19, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("ViT256", 224), ("ViT256", 304), ("SAM-B", 256)])
def test_equal_weights_give_what_the_package_gives(name, side):
    model = randomised(theirs(name))
    read = {key: value for key, value in model.state_dict().items() if not UNREAD.match(key)}
    assert fingerprint(read) == RELEASED[name]
    network = released(name)
    network.load_state_dict(read, assign=True)
    image = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        expected, found = model(image), network.eval()(image)
    for key, maps in zip(("nuclei_binary_map", "hv_map"), found, strict=True):
        assert (maps - expected[key]).abs().max() < 1e-4 * expected[key].std()


@pytest.mark.filterwarnings("ignore:Please import")  # SciPy's, of what the package imports
@pytest.mark.parametrize(("mpp", "sizes"), [(0.25, {}), (0.5, {"object_size": 3, "ksize": 11})])
def test_equal_maps_give_the_labels_that_the_package_gives(mpp, sizes):
    module = pytest.importorskip(
        "cellvit.models.cell_segmentation.postprocessing",
        reason="the package cellvit is not installed",
        exc_type=ImportError,
    )
    package = module.DetectionCellPostProcessor(nr_types=6)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        smooth = [ndimage.gaussian_filter(rng.normal(size=(211, 197)), s) for s in (4, 3, 3)]
        raised, *maps = (one.astype(np.float32) * 20 for one in smooth)
        stack = np.dstack([(raised > 0.5).astype(np.float32), *maps])
        expected = package._proc_np_hv(stack, **sizes)
        assert np.array_equal(_cellvit_cells.separate(raised > 0.5, *maps, mpp), expected)


# maps to nuclei


@pytest.mark.parametrize(("mpp", "radius"), [(0.25, 14), (0.5, 8)])
def test_ideal_maps_give_each_nucleus_and_its_centre(mpp, radius):
    """A grid, in which every second pair touches."""
    gap = round(1.8 * radius)
    discs = [
        (x + shift, y, radius)
        for y in range(20, 190, 3 * radius)
        for x in range(20, 170, 5 * radius)
        for shift in (0, gap)
    ]
    truth = numbered(discs, (223, 227))
    labels = _cellvit_cells.separate(truth > 0, *offsets(truth), mpp)
    assert labels.max() == len(discs) and len(np.unique(labels)) == len(discs) + 1
    found, expected = centres(labels), centres(truth)
    nearest = np.linalg.norm(found[:, None] - expected[None], axis=2)
    assert nearest.min(axis=1).max() < 0.5 and len(set(nearest.argmin(axis=1))) == len(discs)
    assert ((labels > 0) == (truth > 0)).mean() > 0.999


def test_a_nucleus_cut_by_the_edge_is_kept():
    truth = numbered([(0, 30, 12), (70, 60, 12)], (61, 71))
    labels = _cellvit_cells.separate(truth > 0, *offsets(truth), 0.25)
    assert np.abs(centres(labels)[np.argsort(centres(labels)[:, 1])] - centres(truth)).max() < 0.5


def test_no_mask_and_specks_give_no_nuclei():
    noise = np.random.default_rng(1).normal(size=(2, 61, 67)).astype(np.float32)
    nothing = np.zeros((61, 67), bool)
    assert not _cellvit_cells.separate(nothing, *noise, 0.25).any()
    nothing[5:8, 5:8] = True
    assert not _cellvit_cells.separate(nothing, *noise, 0.25).any()
    flat = np.zeros_like(noise)
    assert _cellvit_cells.separate(nothing, *flat, 0.25).dtype == np.int32


# the detector


@pytest.fixture
def small(monkeypatch, tmp_path) -> cellvit.Params:
    """Random weights of a small network, in a file like the released ones."""
    monkeypatch.setitem(_cellvit_encoders.RELEASED, "ViT256", PLAIN)
    monkeypatch.setitem(_cellvit_encoders.RELEASED, "SAM-B", WINDOWED)
    save(tmp_path / "weights.pth", _cellvit_network.CellViT(PLAIN))
    return cellvit.Params(str(tmp_path / "weights.pth"), 0.25, "cpu")


def save(path, network: nn.Module, arch: str = "CellViT256", config: dict | None = None) -> None:
    unread = {"encoder.norm.weight": torch.ones(16), "encoder.head.bias": torch.ones(19)}
    state = randomised(network).state_dict() | unread
    notes = {"epoch": 130, "best_metric": np.float64(0.5)}
    torch.save({"arch": arch, "model_state_dict": state, "config": config or CONFIG, **notes}, path)


class Ideal(nn.Module):
    """Stands in for the trained network: ideal maps of the dark discs in each image."""

    sides: list[int] = []

    def __init__(self, sizes):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        dark = (image.mean(dim=1) < 0).numpy()
        self.sides.append(image.shape[-1])
        maps = np.stack([offsets(ndimage.label(one)[0]) for one in dark])
        nucleus = torch.from_numpy(np.where(dark, 4.0, -4.0)) + self.logit
        return torch.stack([-nucleus, nucleus], dim=1), torch.from_numpy(maps)


@pytest.fixture
def ideal(monkeypatch, tmp_path) -> cellvit.Params:
    monkeypatch.setattr(_cellvit_network, "CellViT", Ideal)
    monkeypatch.setattr(Ideal, "sides", [])
    state = {"logit": torch.zeros(1)}
    checkpoint = {"arch": "CellViT256", "model_state_dict": state, "config": CONFIG}
    torch.save(checkpoint, tmp_path / "weights.pth")
    return cellvit.Params(str(tmp_path / "weights.pth"), 0.25, "cpu")


def drawn(discs_um, mpp: float, shape: tuple[int, int]) -> np.ndarray:
    """Discs (x, y, radius) in microns, antialiased by drawing at a fourfold size."""
    image = np.full((4 * shape[0], 4 * shape[1]), BACKGROUND, np.uint8)
    for x, y, radius in discs_um:
        scaled = [round(value / mpp * 4 * 16) for value in (x, y)]
        at = (scaled[0] - 8, scaled[1] - 8)
        cv2.circle(image, at, round(radius / mpp * 4 * 16), NUCLEUS, -1, shift=4)
    gray = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    return np.repeat(gray[..., None], 3, axis=2)


@pytest.mark.parametrize("weights_mpp", [0.25, 0.5])
@pytest.mark.parametrize("mpp", [0.17, 0.25, 0.37, 0.5])
def test_nuclei_come_back_in_pixels_of_the_patch_whatever_the_scales(ideal, weights_mpp, mpp):
    discs = [(9.0, 14.5, 3.5), (41.25, 12.0, 5.0), (24.0, 31.5, 6.0)]
    shape = round(43 / mpp), round(53 / mpp)
    detector = cellvit.build(replace(ideal, mpp=weights_mpp))
    nuclei = detector(drawn(discs, mpp, shape)[None], mpp)[0]
    order = np.argsort(nuclei.radius_um)
    found = nuclei.centroid_px[order] * mpp
    assert np.abs(found - np.array(discs)[:, :2]).max() < 0.15
    assert np.abs(nuclei.radius_um[order] - np.array(discs)[:, 2]).max() < 0.2
    assert nuclei.score == pytest.approx(1 / (1 + np.exp(-8)), abs=1e-4)
    for outline, (x, y, radius) in zip([nuclei.outline_px[i] for i in order], discs, strict=True):
        away = np.hypot(*(outline * mpp - (x, y)).T)
        assert np.abs(away - radius).max() < 1.0
    assert all(side % 16 == 0 for side in Ideal.sides)


def test_padding_holds_no_nuclei(ideal):
    """A disc that the mirror doubles is one nucleus, and its centre lies in the patch."""
    patch = drawn([(22.0, 22.0, 4.0)], 0.25, (91, 91))[None]
    (nuclei,) = cellvit.build(ideal)(patch, 0.25)
    assert len(nuclei.score) == 1 and (nuclei.centroid_px < 91).all() and Ideal.sides == [256]


def test_large_patches_pass_in_windows_that_count_each_nucleus_once(ideal):
    grid = [(x, y, 5.0) for y in range(20, 330, 61) for x in range(14, 590, 57)]
    patch = drawn(grid, 0.5, (683, 1217))
    (nuclei,) = cellvit.build(ideal)(patch[None], 0.5)
    assert Ideal.sides == [1024] * 6 and len(nuclei.score) == len(grid)
    away = np.linalg.norm(nuclei.centroid_px[:, None] * 0.5 - np.array(grid)[None, :, :2], axis=2)
    assert away.min(axis=1).max() < 0.3 and len(set(away.argmin(axis=1))) == len(grid)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 1920, 1921, 2049, 7919])
def test_windows_cover_each_pixel_once_and_see_beyond_their_part(length):
    """By definition: parts follow one another, and two windows share OVERLAP_PX or more."""
    starts, side, parts = _spans.of(length, 1024, 128)
    assert parts[0, 0] == 0 and parts[-1, 1] == length and starts[-1] + side == length
    assert (parts[1:, 0] == parts[:-1, 1]).all()
    assert (starts[:-1] + side - starts[1:] >= 127.5).all()
    for start, (begin, end) in zip(starts, parts, strict=True):
        assert begin - start >= (63.5 if start else 0)
        assert start + side - end >= (63.5 if start + side < length else 0)


@pytest.mark.parametrize("gray", [BACKGROUND, 255])
def test_finds_nothing_in_a_blank_patch(ideal, gray):
    (nuclei,) = cellvit.build(ideal)(np.full((1, 61, 61, 3), gray, np.uint8), 0.25)
    assert nuclei.centroid_px.shape == (0, 2) and nuclei.outline_px == []


def balance(detector, patch: np.ndarray) -> None:
    """Shift the random network's threshold to where half of a patch is nuclei."""
    middle = np.median(detector._maps(patch)[0])
    header = detector._model.network.nuclei_binary_map_decoder.decoder0_header
    with torch.no_grad():
        header[2].bias[1] -= float(np.log(middle / (1 - middle)))


@pytest.mark.parametrize("arch", ["CellViT256", "CellViTSAM"])
def test_a_patch_is_treated_alike_whatever_others_are_given(small, tmp_path, arch):
    if arch == "CellViTSAM":
        config = {"model": {"backbone": "SAM-B"}, "transformations": {}}
        save(tmp_path / "weights.pth", _cellvit_network.CellViT(WINDOWED), arch, config)
    noise = np.random.default_rng(0).normal(128, 900, (3, 67, 71, 3))
    patches = ndimage.gaussian_filter(noise, (0, 4, 4, 0)).clip(0, 255).astype(np.uint8)
    detector = cellvit.build(small)
    balance(detector, patches[0])
    together = detector(patches, 0.3)
    assert sum(len(nuclei.score) for nuclei in together) > 0
    for patch, nuclei in zip(patches, together, strict=True):
        (alone,) = detector(patch[None], 0.3)
        for name in ("centroid_px", "radius_um", "score"):
            assert np.array_equal(getattr(alone, name), getattr(nuclei, name))
            assert np.isfinite(getattr(alone, name)).all()
    assert detector(patches[:0], 0.3) == []


def test_values_are_scaled_as_the_file_says(small, tmp_path):
    """A patch at the mean of the file's values reaches the network as zeros."""
    values = {"mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3]}
    config = {"transformations.normalize.mean": values["mean"]}
    config["transformations.normalize.std"] = values["std"]
    save(tmp_path / "weights.pth", _cellvit_network.CellViT(PLAIN), config=config)
    model, seen = cellvit.build(small)._model, []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = np.tile(np.array([51, 153, 153], np.uint8), (16, 16, 1))
    model(image)
    expected = torch.tensor([0.0, 1.0, 0.0])
    assert torch.allclose(seen[0][0, :, 3, 5], expected, atol=1e-5)


def test_version_follows_the_content_of_the_weights(small, tmp_path):
    first = cellvit.build(small)
    (tmp_path / "copy").write_bytes((tmp_path / "weights.pth").read_bytes())
    assert cellvit.build(replace(small, weights=str(tmp_path / "copy"))).version == first.version
    save(tmp_path / "weights.pth", _cellvit_network.CellViT(PLAIN), config={"other": 1})
    assert cellvit.build(small).version != first.version and first.device == "cpu"


# errors


def test_says_where_to_get_missing_weights_and_their_licence(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights is .*gone.*zenodo.*Commons Clause"):
        cellvit.build(replace(small, weights=str(tmp_path / "gone")))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" * 40])
def test_names_damaged_weights_and_their_digest(small, tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"pth \(sha256 [0-9a-f]{64}\) is damaged .*fetch .* anew"):
        cellvit.build(small)


def test_refuses_a_file_that_is_cut(small, tmp_path):
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "weights.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"\(sha256 [0-9a-f]{64}\) is damaged"):
        cellvit.build(small)


def test_refuses_to_run_code_in_weights(small, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"arch": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        cellvit.build(small)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arch": "CellViTUNI"}, "holds a CellViTUNI, and known are CellViT256 and CellViTSAM"),
        ({"arch": "CellViTSAM"}, "has the backbone VIT256, and known are SAM-B, SAM-H, SAM-L"),
        ({"config": None}, "is no checkpoint of CellViT, which has arch, config, model_state_dict"),
        ({"model_state_dict": {}}, r"lacks encoder.cls_token of shape \[1, 1, 16\], and \d+ more"),
    ],
)
def test_refuses_other_networks(small, tmp_path, changes, why):
    checkpoint = torch.load(tmp_path / "weights.pth", weights_only=False) | changes
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=why):
        cellvit.build(small)


def test_rejects_a_scale_that_no_weights_have(small):
    with pytest.raises(ValueError, match="cellvit.mpp is 0.3: it must be 0.25 .*x40, or 0.5"):
        replace(small, mpp=0.3)


def test_refuses_patches_that_are_too_coarse(small):
    patch = np.full((1, 16, 16, 3), 240, np.uint8)
    assert len(cellvit.build(small)(patch, 1.0)) == 1
    with pytest.raises(ValueError, match=r"mpp of the patches is 1.25, .* 5 times .* 1 or less"):
        cellvit.build(small)(patch, 1.25)


def test_rejects_patches_that_are_not_rgb(small):
    with pytest.raises(ValueError, match="patches are uint8"):
        cellvit.build(small)(np.zeros((1, 9, 9), np.uint8), 0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_rejects_a_device_that_is_not_there(small):
    with pytest.raises(ValueError, match="detect.cellvit.device is cuda, and there is none"):
        cellvit.build(replace(small, device="cuda"))


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(small):
    """In sixteen bits, as the file asks for."""
    patch = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    maps = [cellvit.build(replace(small, device=device))._maps(patch) for device in ("cpu", "cuda")]
    assert np.abs(maps[0] - maps[1]).max() < 0.02


def test_the_plug_in_is_found_by_name():
    assert plugins.load("detectors", "cellvit").Params is cellvit.Params
