"""Detect: level-0 positions, what the cache key holds, the overlay, the metrics."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from stages import detect
from stages.common import cache, fingerprint, stores, tally
from stages.common.perslide import Job
from stages.detectors import Detection, _overlay, cellpose, hematoxylin
from tests.stages.test_batches import Small
from tests.stages.test_instanseg import WEIGHTS

PX, MPP, SLIDE_MPP = 61, 0.5, 0.2
OWN = hematoxylin.Params("auto", 1.8, 9.0, 0.1, 0.9, 1.1, 6.0)
SETTINGS = detect.DetectParams("hematoxylin", 3)
SECTIONS = {
    "engine": {"workers": 1, "scheduler": ""},
    "detect": {
        "detector": "hematoxylin",
        "batch_patches": 3,
        "hematoxylin": {
            "channel": "auto",
            "min_radius_um": 1.8,
            "max_radius_um": 9.0,
            "min_contrast": 0.1,
            "strictness": 0.9,
            "min_blueness": 1.1,
            "merge_um": 6.0,
        },
    },
}
NUCLEI = [[(20, 31)], [], [(12, 14), (45, 40)], [(40, 22)]]  # (x, y) of pixels, one list a patch


def patch_of(nuclei: list[tuple[int, int]]) -> np.ndarray:
    patch = np.full((PX, PX, 3), (236, 231, 238), np.uint8)
    for centre in nuclei:
        cv2.circle(patch, centre, 7, (60, 50, 110), -1)
    return patch


def a_slide(data: Path, name: str, nuclei: list[list[tuple[int, int]]], mpp: float = MPP) -> None:
    origin = np.arange(len(nuclei))[:, None] * 1000 + np.array([[170_000, 300]])
    attributes = {"slide_id": name, "mpp": mpp, "slide_mpp": SLIDE_MPP, "input": "-"}

    def tile(folder: Path) -> None:
        patches = [patch_of(mine) for mine in nuclei]
        stores.create_patches(folder / "patches.zarr", patches, origin, PX, attributes, "zstd")

    key = cache.key_of("tile", name, (str(nuclei),), {}, "")
    cache.build("tile", key, name, {}, tile)
    cache.link(cache.entry("tile", key), data / "tile" / name)


def made(data: Path, name: str, settings=SETTINGS) -> Path:
    folder = data / f"made-{len(list(data.iterdir()))}"
    folder.mkdir()
    detect.make(folder, detect._job(name, data / "tile" / name, settings, OWN))
    return folder


def write_params(**changes) -> None:
    section = {**SECTIONS["detect"], **changes}
    Path("params.yaml").write_text(yaml.safe_dump({**SECTIONS, "detect": section}))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    write_params()
    return tmp_path / "data"


def test_centroids_are_level_0_pixels_and_rows_name_their_patch(data):
    a_slide(data, "a", NUCLEI)
    nuclei = stores.open_nuclei(made(data, "a") / "nuclei.zarr")
    assert nuclei.patch_index.tolist() == [0, 2, 2, 3]
    pixels = np.array([point for mine in NUCLEI for point in mine])
    # The pixel (x, y) is centred at x + 0.5, and 2.5 times as wide as one of level 0.
    expected = (pixels + 0.5) * 2.5 + nuclei.patch_index[:, None] * 1000 + [170_000, 300]
    order = np.lexsort((nuclei.centroid[:, 0], nuclei.patch_index))
    assert np.abs(nuclei.centroid[order] - expected).max() < 0.7  # a quarter of a patch pixel
    assert nuclei.radius_um == pytest.approx(7.3 * MPP, abs=0.4)
    assert ((nuclei.score > 0.5) & (nuclei.score < 1)).all()
    assert nuclei.attributes["mpp"] == MPP and nuclei.attributes["slide_mpp"] == SLIDE_MPP


def test_batches_change_no_byte(data):
    a_slide(data, "a", NUCLEI)
    folders = [made(data, "a", replace(SETTINGS, batch_patches=size)) for size in (1, 3, 99)]
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert Path("overlay.jpg") in names
    for name in names:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_a_slide_without_nuclei_has_an_empty_store(data):
    a_slide(data, "a", [[], []])
    folder = made(data, "a")
    nuclei = stores.open_nuclei(folder / "nuclei.zarr")
    assert nuclei.centroid.shape == (0, 2) and nuclei.centroid.dtype == np.float32
    assert (folder / "overlay.jpg").is_file()


def test_the_tally_knows_the_radii_that_the_detector_drops(data):
    a_slide(data, "a", NUCLEI)
    assert tally.read(made(data, "a")).limits_um == {"least": 1.8, "most": 9.0}


def test_pictures_and_flags_are_not_in_the_key_and_what_is_stored_is(tmp_path):
    """An edit of the overlay's colour must not detect thousands of slides again."""
    for package in ("stages", "cytossl_core"):
        shutil.copytree(fingerprint.ROOT / package, tmp_path / package)

    def digest() -> str:
        fingerprint._tree.cache_clear()
        modules = ("stages.detect", "stages.detectors.hematoxylin")
        return fingerprint.code_digest(modules, tmp_path)

    before = digest()
    for name in ("detectors/_overlay", "detectors/_outlines", "common/pictures", "common/flags"):
        with (tmp_path / "stages" / f"{name}.py").open("a") as opened:
            opened.write("EDITED = 1\n")
    assert digest() == before
    for name in ("common/stores", "common/tally", "detectors/_patches", "detectors/hematoxylin"):
        with (tmp_path / "stages" / f"{name}.py").open("a") as opened:
            opened.write("EDITED = 1\n")
        assert digest() != before
        before = digest()


def test_overlay_circles_nuclei_and_goes_from_full_to_empty(data):
    a_slide(data, "a", NUCLEI)
    sheet = cv2.imread(str(made(data, "a") / "overlay.jpg"))[..., ::-1].astype(int)
    side = _overlay.SHEET_PX
    assert sheet.shape == (side, 4 * side, 3)
    green = np.abs(sheet - _overlay.MARK_RGB).sum(axis=2) < 60
    shares = [green[:, at * side : (at + 1) * side].mean() for at in range(4)]
    assert shares[0] > 1.5 * shares[1] and shares[1] > 0.003 and shares[3] == 0
    rows, columns = np.nonzero(green[:, side : 2 * side])  # the first of those with one nucleus
    assert np.hypot(columns.mean() - 20.5 * side / PX, rows.mean() - 31.5 * side / PX) < 4


def test_overlay_shows_16_of_many_patches(data):
    a_slide(data, "a", NUCLEI * 11)
    sheet = cv2.imread(str(made(data, "a") / "overlay.jpg"))
    assert sheet.shape == (4 * _overlay.SHEET_PX, 4 * _overlay.SHEET_PX, 3)


def test_overlay_draws_outlines_where_there_are_any(tmp_path):
    """A box around the second quarter, and no circle."""
    box = np.array([[8, 4], [12, 4], [12, 8], [8, 8]], np.float32)
    points = np.array([[10, 6]], np.float32), np.ones(1, np.float32), np.ones(1, np.float32)
    patch = np.full((16, 16, 3), 240, np.uint8)
    _overlay.write(tmp_path / "sheet.jpg", [patch], [Detection(*points, [box])], 0.5)
    sheet = cv2.imread(str(tmp_path / "sheet.jpg"))[..., ::-1].astype(int)
    dark = np.argwhere(np.abs(sheet - _overlay.MARK_RGB).sum(axis=2) < 60)[:, ::-1] / 20
    assert np.abs(dark.min(axis=0) - (8, 4)).max() < 0.15
    assert np.abs(dark.max(axis=0) - (12, 8)).max() < 0.15
    inside = (np.abs(dark - (10, 6)) < 1.8).all(axis=1)
    assert len(dark) > 500 and not inside.any()


def test_the_stage_writes_all_slides_and_metrics(data):
    a_slide(data, "a", NUCLEI)
    a_slide(data, "b", [[], [(30, 30)]])
    detect.main()
    assert len(stores.open_nuclei(data / "detect/a/nuclei.zarr").score) == 4
    assert len(stores.open_nuclei(data / "detect/b/nuclei.zarr").score) == 1
    assert json.loads((data / "detect/metrics.json").read_text()) == {
        "slides": 2,
        "patches": 6,
        "nuclei": 5,
        "nuclei_per_patch": 5 / 6,
        "patches_without_nuclei": 2,
        "slides_flagged": 0,
        "cohort_flags": 0,
        "failed": 0,
    }


def keys_of(monkeypatch, **changes) -> str:
    """What `main` hands to the per-slide map as deciding the bytes."""
    seen = {}
    monkeypatch.setattr(detect.perslide, "run", lambda *_, **named: seen.update(named) or [])
    monkeypatch.setattr(detect.quality, "write", lambda *_: {"nuclei": 0, "patches": 0})
    write_params(**changes)
    detect.main()
    return json.dumps([seen["settings"], seen["code"]])


def test_detector_settings_are_in_the_key_and_the_batch_is_not(data, monkeypatch):
    a_slide(data, "a", NUCLEI)
    first = keys_of(monkeypatch)
    assert "stages.detectors.hematoxylin" in first and "scikit-image" in first
    assert keys_of(monkeypatch, batch_patches=50) == first
    own = {**SECTIONS["detect"]["hematoxylin"], "merge_um": 5.0}
    assert keys_of(monkeypatch, hematoxylin=own) != first


def test_weights_are_in_the_key_by_content_and_not_by_place(data, monkeypatch):
    class Stub:
        def __init__(self, params):
            self.version = f"stub, weights {Path(params.weights).read_text()}"
            self.device = "cpu"

    monkeypatch.setattr(cellpose, "build", Stub)
    a_slide(data, "a", NUCLEI)
    keys = []
    for name, content in (("one", "1"), ("moved", "1"), ("other", "2")):
        Path(name).write_text(content)
        own = {
            "weights": name,
            "diameter_um": 8.0,
            "flow_threshold": 0.4,
            "cellprob_threshold": 0.0,
            "batch_tiles": 8,
            "device": "auto",
        }
        keys.append(keys_of(monkeypatch, detector="cellpose", cellpose=own))
    assert keys[0] == keys[1] != keys[2]


def test_one_changed_slide_is_one_slide_detected(data, caplog):
    caplog.set_level("INFO")
    for name in ("a", "b"):
        a_slide(data, name, NUCLEI)
    detect.main()
    (data / "tile" / "b").rename(data / "old")
    a_slide(data, "b", NUCLEI[:2])
    detect.main()
    assert "detect: 1 slides to make, 1 reused" in caplog.text
    assert len(stores.open_nuclei(data / "detect/b/nuclei.zarr").score) == 1


def test_where_and_how_many_at_once_is_not_in_the_key(data, monkeypatch):
    class Stub:
        version, device = "stub", "cpu"

        def __init__(self, params):
            pass

    monkeypatch.setattr(cellpose, "build", Stub)
    a_slide(data, "a", NUCLEI)
    own = {"weights": "w", "diameter_um": 8.0, "flow_threshold": 0.4, "cellprob_threshold": 0.0}
    keys = [
        keys_of(monkeypatch, detector="cellpose", cellpose={**own, **more})
        for more in (
            {"batch_tiles": 8, "device": "auto"},
            {"batch_tiles": 1, "device": "cpu"},
            {"batch_tiles": 1, "device": "cpu", "diameter_um": 9.0},
        )
    ]
    assert keys[0] == keys[1] != keys[2]


def test_switching_detectors_back_and_forth_detects_nothing_again(data, caplog):
    """With the real stage: two detectors, two settings of one, and a slide that comes later."""
    caplog.set_level("INFO")
    own = SECTIONS["detect"]["hematoxylin"]
    network = {"weights": str(data.parent / "net"), "sha256": "", "seed_threshold": 0.7}
    network |= {"min_radius_um": 1.8, "device": "cpu"}
    choices = [{}, {"hematoxylin": {**own, "merge_um": 5.0}}]
    if WEIGHTS.is_file():
        (data.parent / "net").symlink_to(WEIGHTS)
        choices.append({"detector": "instanseg", "instanseg": network})
    a_slide(data, "a", NUCLEI)
    for round_ in ("1 slides to make, 0 reused", "0 slides to make, 1 reused"):
        for choice in choices:
            caplog.clear()
            write_params(**choice)
            detect.main()
            assert f"detect: {round_}" in caplog.text
    a_slide(data, "b", NUCLEI[:2])
    for choice in choices:
        caplog.clear()
        write_params(**choice)
        detect.main()
        assert "detect: 1 slides to make, 1 reused" in caplog.text


def test_what_was_learned_of_the_memory_holds_for_the_next_slide(data, monkeypatch, caplog):
    detector = Small(fits=2)
    monkeypatch.setattr(detect, "_detector", lambda name, own: detector)
    for name in ("a", "b"):
        a_slide(data, name, NUCLEI)
        made(data, name, replace(SETTINGS, batch_patches=4))
    assert detector.tried == [4, 2, 2, 2, 2] and len(caplog.records) == 1


def test_a_slide_without_patches_says_so(data):
    a_slide(data, "a", NUCLEI)
    store = data / "tile" / "a" / "patches.zarr"
    attributes = stores.open_patches(store).attributes
    shutil.rmtree(store)
    stores.create_patches(store, [], np.empty((0, 2), np.int64), PX, attributes, "zstd")
    with pytest.raises(ValueError, match="slide a has no patches: run `dvc repro tile`"):
        made(data, "a")


def test_a_gpu_gets_one_process_and_the_bar_counts_patches(data, monkeypatch):
    seen = []
    run = lambda *given, **named: seen.append((given, named)) or []  # noqa: E731
    monkeypatch.setattr(detect.perslide, "run", run)
    monkeypatch.setattr(detect.quality, "write", lambda *_: {"nuclei": 0, "patches": 0})
    a_slide(data, "a", NUCLEI)
    for device in ("cuda", "cpu"):
        detector = Small(1, device)
        monkeypatch.setattr(detect, "_detector", lambda name, own, it=detector: it)
        detect.main()
    assert [named["device"] for _, named in seen] == ["cuda", "cpu"]
    assert seen[0][1]["unit"] == "patches" and seen[0][0][2][0].work == len(NUCLEI)


def test_an_unknown_detector_lists_those_there_are(data):
    write_params(detector="haematoxylin")
    with pytest.raises(ValueError, match=r"no 'haematoxylin'.*hematoxylin"):
        detect.main()


def test_missing_weights_end_the_stage_before_any_slide(data):
    pytest.importorskip("cellpose", reason="cellpose is an extra")
    a_slide(data, "a", NUCLEI)
    own = {"weights": "gone", "diameter_um": 8.0, "flow_threshold": 0.4}
    own |= {"cellprob_threshold": 0.0, "batch_tiles": 8, "device": "auto"}
    write_params(detector="cellpose", cellpose=own)
    with pytest.raises(FileNotFoundError, match=r"detect.cellpose.weights is gone"):
        detect.main()
    assert not (data / "detect").exists()


def test_says_which_stage_comes_first(data):
    with pytest.raises(FileNotFoundError, match=r"no data/tile: run `dvc repro tile` first"):
        detect.main()


def test_rejects_an_empty_batch():
    with pytest.raises(ValueError, match="detect.batch_patches is 0: it must be 1 or more"):
        replace(SETTINGS, batch_patches=0)


def test_make_takes_any_detector(data, monkeypatch):
    class Corner:
        version, device = "corner", "cpu"

        def __call__(self, patches, mpp):
            one = np.array([[0.0, 0.0]], np.float32), np.ones(1, np.float32), np.ones(1, np.float32)
            return [Detection(*one) for _ in patches]

    monkeypatch.setattr(detect, "_detector", lambda name, own: Corner())
    a_slide(data, "a", NUCLEI)
    folder = data / "made"
    folder.mkdir()
    tiles = data / "tile" / "a"
    detect.make(folder, Job("a", (), {"tiles": tiles, "params": SETTINGS, "own": None}))
    nuclei = stores.open_nuclei(folder / "nuclei.zarr")
    assert np.array_equal(nuclei.centroid, stores.open_patches(tiles / "patches.zarr").origin)
