"""A hospital's folder as it is: sub-folders, DICOM folders, MRXS, names without suffix."""

import csv
import shutil
import unicodedata
from pathlib import Path

import pytest

from stages.sources import folder
from tests.common.pyramids import write


def build(home: Path, *slides: str) -> list:
    """The source's rows for slides that are called so in the labels file."""
    with (home / "labels.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("slide", "label"), *((name, "benign") for name in slides)])
    return folder.build(folder.Params(str(home), str(home / "labels.csv")), 0, home)


@pytest.fixture
def home(tmp_path):
    """Slides by year and month, a report beside one, an MRXS slide, two slides of one name."""
    for name in ("2023/11/S 1.svs", "2023/12/S 2.a.tiff", "2024/twin.svs", "2023/12/twin.svs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "2023/11/S 1.xml").write_text("<report/>")
    (tmp_path / "2024/M1").mkdir()
    for name in ("M1.mrxs", "M1/Slidedat.ini", "M1/Data0000.dat"):
        (tmp_path / "2024" / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "file", "slide_id"),
    [
        ("2023/11/S 1.svs", "2023/11/S 1.svs", "S 1"),
        (r"2023\11\S 1.svs", "2023/11/S 1.svs", "S 1"),
        ("S 1.svs", "2023/11/S 1.svs", "S 1"),
        ("S 1", "2023/11/S 1.svs", "S 1"),
        ("S 2.a", "2023/12/S 2.a.tiff", "S 2.a"),
        ("M1", "2024/M1.mrxs", "M1"),
        ("2024/M1", "2024/M1.mrxs", "M1"),
        ("M1.mrxs", "2024/M1.mrxs", "M1"),
    ],
)
def test_a_slide_is_found_by_path_or_name(home, given, file, slide_id):
    (row,) = build(home, given)
    assert Path(row.path) == home / file
    assert row.slide_id == row.patient == slide_id


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("twin", r"slide twin may be 2023/12/twin\.svs and 2024/twin\.svs: give its path within"),
        ("2023", "slide 2023 is a folder without .dcm files: name a slide file"),
        (r"..\S 1.svs", "lies outside"),
    ],
)
def test_a_name_that_tells_no_slide(home, given, message):
    with pytest.raises(ValueError, match=message):
        build(home, given)


def test_dicom_folders(shared_data, tmp_path):
    source = shared_data / "wsi" / "CMU-1-Small-Region-dicom"
    shutil.copytree(source, tmp_path / "scans" / "1.2.840.7")
    for given in ("scans/1.2.840.7", "1.2.840.7"):
        (row,) = build(tmp_path, given)
        assert row.slide_id == "1.2.840.7"
        assert Path(row.path) == sorted((tmp_path / "scans" / "1.2.840.7").glob("*.dcm"))[0]


@pytest.mark.parametrize("given", ["absent", "S", "2024/late.svs"])
def test_a_slide_that_is_not_there_is_for_the_stage_to_judge(home, given):
    (row,) = build(home, given)
    assert Path(row.path) == home / given


@pytest.mark.parametrize("given", ["Präparate/Lámina 1.svs", "Lámina 1", "Lámina 1.svs"])
def test_accents_match_in_either_form(tmp_path, given):
    """As a folder copied from macOS and a table written on Windows, or the other way round."""
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        home = tmp_path / form
        file = home / unicodedata.normalize(form, "Präparate/Lámina 1.svs")
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
        (row,) = build(home, unicodedata.normalize(other, given))
        assert Path(row.path) == file
        assert row.slide_id == unicodedata.normalize("NFC", "Lámina 1")


def test_a_name_alone_is_found_behind_a_link(home, tmp_path_factory):
    other = tmp_path_factory.mktemp("archive")
    (other / "far.svs").write_bytes(b"x")
    (home / "archive").symlink_to(other)
    (home / "2024/loop").symlink_to(home)
    assert Path(build(home, "far")[0].path) == home / "archive/far.svs"
    assert build(home, "S 1")[0].slide_id == "S 1"


def test_the_walk_is_not_remembered(home):
    build(home, "late")
    write(home / "2024" / "late.svs", (300, 300), (1,))
    assert Path(build(home, "late")[0].path) == home / "2024" / "late.svs"
