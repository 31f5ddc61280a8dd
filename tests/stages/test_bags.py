"""Bags of TRIDENT and CLAM: as those programs write them, there and back, and hostile ones."""

import logging
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stages import bags, evaluate
from stages.common import interop, stores
from tests.stages.evaluated import Laboratory, embedding_of, figures
from tests.test_pipeline import Repository, copy_tree, set_params

SIDE = {"patch_size": 256, "patch_size_level0": 512}


def points_of(count: int) -> np.ndarray:
    return np.arange(2 * count, dtype=np.int64).reshape(count, 2) * 512


def write_as_trident(path: Path, features: np.ndarray, coords: np.ndarray | None = None) -> None:
    """Chunks of one row that may grow, and the attributes of `coords`."""
    coords = points_of(features.shape[-2]) if coords is None else coords
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords)):
            shape = values.shape[1:]
            file.create_dataset(name, data=values, chunks=(1, *shape), maxshape=(None, *shape))
        told = {**SIDE, "level0_magnification": 40, "target_magnification": 20, "overlap": 0}
        file["coords"].attrs.update({**told, "name": path.stem, "savetodir": "None"})
        file["features"].attrs.update({"encoder": "uni_v1", "name": path.stem})


def write_as_clam(path: Path, features: np.ndarray) -> None:
    """Chunks of 32 rows, coords in 32 bits, no attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        how = {"chunks": (32, features.shape[1]), "maxshape": (None, features.shape[1])}
        file.create_dataset("features", data=features, **how)
        points = points_of(len(features)).astype(np.int32)
        file.create_dataset("coords", data=points, chunks=(32, 2), maxshape=(None, 2))


@pytest.fixture
def lab(tmp_path, monkeypatch, caplog) -> Laboratory:
    """The cohort, with no bags yet."""
    caplog.set_level(logging.INFO)
    made = Laboratory(tmp_path, monkeypatch)
    made.split()
    made.settings()
    return made


@pytest.fixture
def foreign(lab, tmp_path) -> Path:
    """A file of TRIDENT for each slide of the cohort."""
    for row in lab.rows:
        write_as_trident(tmp_path / "foreign" / f"{row.slide_id}.h5", embedding_of(row))
    return tmp_path / "foreign"


def bag_of(lab, slide_id: str, encoder: str = "uni") -> stores.Bag:
    return stores.open_bag(lab.data / "embed" / encoder / slide_id / "bag.zarr")


def rejected(lab, folder: Path, match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        bags.import_bags(folder, "uni")
    assert not (lab.data / "embed" / "uni").exists(), "nothing may be written"


def test_bags_of_trident_are_evaluated_as_an_encoder(lab, foreign):
    bags.import_bags(foreign, "uni")
    bag = bag_of(lab, "test-3")
    np.testing.assert_array_equal(bag.embedding, embedding_of(lab.rows[24]))
    np.testing.assert_array_equal(bag.origin, points_of(len(bag.embedding)))
    told = {name: bag.attributes[name] for name in ("slide_id", "mpp", "slide_mpp", "patch_px")}
    assert told == {"slide_id": "test-3", "mpp": 1.0, "slide_mpp": 0.5, "patch_px": 256}
    lab.write_bags()
    own = figures(lab.run())
    evaluate.main("uni", "meanpool")
    assert figures(lab.data / "evaluate" / "uni" / "meanpool") == own


def test_bags_of_clam_come_in_as_h5_and_as_pt(lab, foreign):
    first, second = lab.rows[0], lab.rows[1]
    write_as_clam(foreign / f"{first.slide_id}.h5", embedding_of(first))
    (foreign / f"{second.slide_id}.h5").unlink()
    torch.save(torch.from_numpy(embedding_of(second)), foreign / f"{second.slide_id}.pt")
    bags.import_bags(foreign, "uni")
    for row in (first, second):
        found = bag_of(lab, row.slide_id)
        np.testing.assert_array_equal(found.embedding, embedding_of(row))
        assert found.attributes["mpp"] is None
    assert bag_of(lab, first.slide_id).origin[1].tolist() == [1024, 1536]
    assert (bag_of(lab, second.slide_id).origin == -1).all()


def test_what_was_exported_comes_back_equal(lab, tmp_path):
    lab.write_bags()
    bags.export_bags("enc", tmp_path / "out")
    for kind in ("h5", "pt"):
        bags.import_bags(tmp_path / "out" / f"{kind}_files", kind)
        for row in lab.rows:
            there, back = (bag_of(lab, row.slide_id, name) for name in ("enc", kind))
            np.testing.assert_array_equal(back.embedding, there.embedding)
    assert bag_of(lab, "val-2", "h5").attributes["mpp"] == 0.5
    np.testing.assert_array_equal(
        bag_of(lab, "val-2", "h5").origin, bag_of(lab, "val-2", "enc").origin
    )


def test_exported_files_have_the_layout_that_others_read(lab, foreign, tmp_path):
    bags.import_bags(foreign, "uni")
    bags.export_bags("uni", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "h5_files" / "train-1.h5") as file:
        features, coords = file["features"], file["coords"]
        count = len(features)
        assert (features.dtype, features.shape) == (np.float32, (count, 5))
        assert (coords.dtype, coords.shape) == (np.int64, (count, 2))
        wanted = {**SIDE, "patch_level": 0, "downsample": 1, "name": "train-1"}
        wanted |= {"mpp": 1.0, "slide_mpp": 0.5, "unit": "pixels of level 0"}
        wanted |= {"target_magnification": 10.0, "level0_magnification": 20.0}
        assert {name: coords.attrs[name] for name in coords.attrs if name != "content"} == wanted
    tensor = torch.load(tmp_path / "out" / "pt_files" / "train-1.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), embedding_of(lab.rows[1]))


def test_a_killed_run_goes_on_and_a_changed_file_is_read_again(lab, foreign, tmp_path, caplog):
    for target in ("out", "out"):
        bags.import_bags(foreign, "uni")
        bags.export_bags("uni", tmp_path / target)
    assert caplog.text.count("0 slides written, 30 there already") == 2
    leftover = lab.data / "embed" / "uni" / "val-1" / ".bag.zarr.99.tmp"
    leftover.mkdir()
    new = embedding_of(lab.rows[15]) + 1
    write_as_trident(foreign / "val-1.h5", new)
    (tmp_path / "out" / "pt_files" / "val-2.pt").unlink()
    bags.import_bags(foreign, "uni")
    bags.export_bags("uni", tmp_path / "out")
    assert "1 slides written, 29 there already" in caplog.text
    assert "2 slides written, 28 there already" in caplog.text
    np.testing.assert_array_equal(bag_of(lab, "val-1").embedding, new)
    assert not leftover.exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_features_with_a_leading_axis_and_of_other_precision_are_read(tmp_path, dtype):
    features = np.random.default_rng(3).normal(size=(1, 7, 5)).astype(dtype)
    write_as_trident(tmp_path / "a.h5", features)
    found = interop.read(tmp_path / "a.h5").features
    np.testing.assert_array_equal(found, features[0].astype(np.float32))


def test_bfloat16_tensors_are_read(tmp_path):
    torch.save(torch.full((3, 2), 1.5, dtype=torch.bfloat16, requires_grad=True), tmp_path / "a.pt")
    assert interop.read(tmp_path / "a.pt").features.tolist() == [[1.5, 1.5]] * 3


FAULTS = {
    "NaN or infinity": np.array([[1.0, 2, 3, 4, 5], [1, 2, np.nan, 4, 5]], np.float32),
    "patch 1 have NaN or infinity": np.array([[1.0] * 5, [1e300] * 5]),
    "no patches": np.zeros((0, 5), np.float32),
    "must be floating-point": np.zeros((3, 5), np.int32),
    "of shape \\(2, 3, 5\\)": np.zeros((2, 3, 5), np.float32),
    "val-3 has features of 6 numbers": np.ones((3, 6), np.float32),
}


@pytest.mark.parametrize("match", FAULTS)
def test_rejects_features_that_are_no_bag_before_anything_is_written(lab, foreign, match):
    points = points_of(FAULTS[match].shape[-2])
    write_plain(foreign / "val-3.h5", FAULTS[match], points)
    rejected(lab, foreign, match)


def write_plain(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords


def test_rejects_coords_of_another_length_or_of_fractions(lab, foreign):
    features = embedding_of(lab.rows[0])
    write_as_trident(foreign / "val-0.h5", features, points_of(len(features) + 1))
    rejected(lab, foreign, "coords are int64 of shape")
    write_as_trident(foreign / "val-0.h5", features, points_of(len(features)) / 3)
    rejected(lab, foreign, "must be integers")


def test_rejects_files_that_do_not_match_the_cohort(lab, foreign):
    write_as_trident(foreign / "stray.h5", np.ones((2, 5), np.float32))
    rejected(lab, foreign, "'stray', which is not in cohort.csv")
    (foreign / "stray.h5").rename(foreign / "...h5")
    rejected(lab, foreign, "'..', which is not in cohort.csv")
    (foreign / "...h5").unlink()
    (foreign / "val-0.pt").touch()
    rejected(lab, foreign, "val-0 has two files")
    for name in ("val-0.pt", "val-0.h5", "test-1.h5"):
        (foreign / name).unlink()
    rejected(lab, foreign, "2 of 30 slides .*: val-0, test-1;")
    rejected(lab, foreign / "absent", "no folder")


@pytest.mark.parametrize("name", ["../uni", "/tmp/uni", "..", "a/b", "", ".uni", "uni\n"])
def test_rejects_names_of_encoders_that_leave_the_folder(lab, foreign, name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        bags.import_bags(foreign, name)
    with pytest.raises(ValueError, match="cannot name a folder"):
        bags.export_bags(name, foreign / "out")


def test_does_not_write_over_an_encoder_of_the_pipeline_nor_through_links(lab, foreign, tmp_path):
    (lab.data / "pretrain" / "pretrained").mkdir(parents=True)
    with pytest.raises(ValueError, match="give another name"):
        bags.import_bags(foreign, "pretrained")
    (tmp_path / "elsewhere").mkdir()
    (lab.data / "embed").mkdir()
    (lab.data / "embed" / "away").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="written through"):
        bags.import_bags(foreign, "away")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_rejects_a_file_that_is_a_link(lab, foreign, tmp_path):
    (foreign / "val-4.h5").rename(tmp_path / "outside.h5")
    (foreign / "val-4.h5").symlink_to(tmp_path / "outside.h5")
    rejected(lab, foreign, "is a link or no file")


def test_rejects_arrays_that_lie_in_other_files(lab, foreign, tmp_path):
    features, points = np.ones((2, 5), np.float32), points_of(2)
    write_as_trident(tmp_path / "secret.h5", features)
    features.tofile(tmp_path / "raw")
    source = h5py.VirtualSource(str(tmp_path / "secret.h5"), "features", shape=(2, 5))
    layout = h5py.VirtualLayout(shape=(2, 5), dtype=np.float32)
    layout[:] = source
    raw = [(str(tmp_path / "raw"), 0, 40)]
    makers = [
        lambda file: file.__setitem__(
            "features", h5py.ExternalLink(str(tmp_path / "secret.h5"), "features")
        ),
        lambda file: file.__setitem__("features", h5py.SoftLink("/coords")),
        lambda file: file.create_virtual_dataset("features", layout),
        lambda file: file.create_dataset("features", (2, 5), np.float32, external=raw),
        lambda file: file.create_group("features"),
    ]
    for make in makers:
        with h5py.File(foreign / "val-5.h5", "w") as file:
            file["coords"] = points
            make(file)
        rejected(lab, foreign, "val-5.h5: features is a link, a group or lies in another file")


def test_rejects_what_cannot_be_read(lab, foreign):
    with h5py.File(foreign / "val-5.h5", "w") as file:
        file["feats"] = np.ones((2, 5), np.float32)
    rejected(lab, foreign, r"has no features, only \['feats'\]")
    (foreign / "val-5.h5").write_bytes(b"nonsense")
    rejected(lab, foreign, "cannot be read as HDF5")
    write_as_trident(foreign / "val-5.h5", np.ones((99, 500), np.float32))
    os.truncate(foreign / "val-5.h5", 90_000)
    rejected(lab, foreign, "val-5.h5")


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_does_not(lab, foreign, tmp_path):
    (foreign / "val-5.h5").unlink()
    torch.save(Bomb(tmp_path / "ran"), foreign / "val-5.pt")
    rejected(lab, foreign, "val-5.pt holds more than tensors or is damaged, and was not run")
    torch.save({"features": torch.ones(2, 5)}, foreign / "val-5.pt")
    rejected(lab, foreign, "holds a dict")
    (foreign / "val-5.pt").write_bytes(b"old pickle")
    rejected(lab, foreign, "is no zip file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 5).to_sparse(),
        torch.ones(2, 5, device="meta"),
        torch.ones(2, 5, dtype=torch.int8),
    ],
    ids=["sparse", "meta", "int8"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_rejects_tensors_that_hold_no_floating_point_numbers(tmp_path, tensor):
    torch.save(tensor, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="dense and of floating-point numbers"):
        interop.survey(tmp_path / "a.pt")


def test_sizes_are_refused_before_they_are_read(tmp_path):
    """Files of some kilobytes that would take terabytes."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (10**9, 1024), np.float32, chunks=(1, 1024))
        file.create_dataset("coords", (10**9, 2), np.int64, chunks=(1, 2))
    with pytest.raises(ValueError, match="takes 3814.7 GiB"):
        interop.survey(path)
    torch.save(torch.zeros(1).expand(10**8, 100), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="takes 37.3 GiB"):
        interop.survey(tmp_path / "a.pt")


def test_large_bags_are_looked_at_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(interop, "BLOCK_BYTES", 1 << 12)
    features = np.random.default_rng(5).normal(size=(1009, 37)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=features, chunks=(64, 37), compression="gzip")
        file["coords"] = points_of(1009)
        sizes = [len(block) for _, block in interop._blocks(tmp_path / "a.h5", file["features"])]
    assert sizes == [64] * 15 + [49]
    np.testing.assert_array_equal(interop.read(tmp_path / "a.h5").features, features)


def test_the_command_names_its_two_forms(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bags", "exprot", "a", "b"])
    with pytest.raises(ValueError, match="give export <encoder> <folder>, or import"):
        bags.command()


@pytest.mark.slow
def test_dvc_evaluates_and_compares_imported_bags_by_single_item(lab, foreign, tmp_path):
    """As README says; and a whole `dvc repro` stops before it deletes them."""
    repository = Repository(tmp_path)
    copy_tree(tmp_path)
    lab.write_bags()
    (lab.data / "embed" / "enc").rename(lab.data / "embed" / "untrained")
    bags.import_bags(foreign, "uni")
    set_params(
        tmp_path,
        {
            "embed.encoders": ["untrained", "uni"],
            "evaluate.heads": ["meanpool"],
            "compare.reference": "untrained",
        },
    )
    repository.run("git", "init", "-q")
    repository.run("dvc", "repro", "--single-item", "evaluate", "compare")
    assert "| uni |" in (lab.data / "compare" / "table1.md").read_text()
    assert "names 'uni'" in repository.run("dvc", "repro", fails=True)
    np.testing.assert_array_equal(bag_of(lab, "val-0").embedding, embedding_of(lab.rows[14]))
