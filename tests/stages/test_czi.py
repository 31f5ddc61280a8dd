"""Zeiss slides, written by pylibCZIrw itself."""

import sys

import numpy as np
import openslide
import pytest

from stages.common.slides import Slide
from stages.readers import czi as reader
from tests.common.pyramids import texture

czi = pytest.importorskip("pylibCZIrw.czi", reason="the extra czi is not installed")


def write(path, pixels, metres=None, planes=1):
    """A CZI whose picture does not begin at the origin, each plane 10 darker than the last."""
    with czi.create_czi(str(path)) as slide:
        for plane in range(planes):
            darker = np.clip(pixels.astype(int) - 10 * plane, 0, 255).astype(np.uint8)
            slide.write(
                np.ascontiguousarray(darker[..., ::-1]),
                location=(30, -20),
                plane={"Z": plane, "C": 0, "T": 0},
            )
        if metres:
            slide.write_metadata(scale_x=metres, scale_y=metres)
    return path


def test_reads_what_openslide_does_not_open(tmp_path):
    pixels = texture(300, 500)
    path = write(tmp_path / "ä slide.czi", pixels, 0.25e-6)
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(path)
    with Slide(path) as slide:
        assert (slide.mpp, slide.width_px, slide.height_px) == (0.25, 500, 300)
        assert np.array_equal(slide.read(17, 33, 100, 90, 0.25), pixels[33:123, 17:117])
        corners = np.array([[0, 0], [250, 150]])
        for (x0, y0), patch in zip(corners, slide.patches(corners, 64, 0.25), strict=True):
            assert np.array_equal(patch, pixels[y0 : y0 + 64, x0 : x0 + 64])
        assert (slide.read(480, 0, 40, 10, 0.25)[:, 20:] == 255).all()


def test_reads_coarser_levels(tmp_path):
    pixels = texture(2100, 4200)
    with Slide(write(tmp_path / "a.czi", pixels, 0.25e-6)) as slide:
        assert slide._source.level_dimensions == ((4200, 2100), (2100, 1050))
        half = slide.read(400, 200, 500, 400, 0.5)
        right = pixels[200:1000, 400:1400].reshape(400, 2, 500, 2, 3).mean((1, 3))
        assert np.corrcoef(half.ravel(), right.ravel())[0, 1] > 0.9


def test_mpp_is_the_csvs_where_the_file_has_none(tmp_path):
    path = write(tmp_path / "a.czi", texture(100, 100))
    with pytest.raises(ValueError, match=r"slide a\.czi has no mpp in its metadata"):
        Slide(path)
    with Slide(path, 0.3) as slide:
        assert slide.mpp == 0.3


@pytest.mark.parametrize(
    ("distance", "mpp"),
    [
        ([{"@Id": axis, "Value": "2.5e-07"} for axis in "XY"], (0.25, 0.25)),
        ({"@Id": "X", "Value": "2.5e-07"}, None),
        ([{"@Id": axis, "Value": None} for axis in "XY"], None),
        ([{"@Id": "X"}, {"@Id": "Y", "Value": "2.5e-07"}], None),
        (None, None),
    ],
)
def test_a_scale_that_is_not_whole_is_none(distance, mpp):
    """One element of XML comes as a map, several as a list of them."""
    scaling = {"Items": {"Distance": distance}}
    assert reader._mpp_of({"ImageDocument": {"Metadata": {"Scaling": scaling}}}) == mpp


def test_the_middle_plane_is_read(tmp_path):
    pixels = np.full((100, 100, 3), 200, np.uint8)
    with Slide(write(tmp_path / "a.czi", pixels, planes=5), 0.25) as slide:
        assert (slide.read(0, 0, 50, 50, 0.25) == 180).all()


def test_damaged_and_gray_files(tmp_path):
    path = write(tmp_path / "a.czi", texture(300, 300), 0.25e-6)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"slide a\.czi is damaged"):
        Slide(path)
    path.write_bytes(b"no slide at all" * 100)
    with pytest.raises(ValueError, match=r"slide a\.czi is damaged"):
        Slide(path)
    with czi.create_czi(str(tmp_path / "gray.czi")) as slide:
        slide.write(np.zeros((90, 90, 1), np.uint16))
    with pytest.raises(ValueError, match=r"slide gray\.czi has Gray16 pixels"):
        Slide(tmp_path / "gray.czi", 0.25)


def test_the_package_may_be_absent(tmp_path, monkeypatch):
    path = write(tmp_path / "a.czi", texture(100, 100), 0.25e-6)
    monkeypatch.setitem(sys.modules, "pylibCZIrw", None)
    with pytest.raises(
        ImportError, match=r"slide a\.czi needs pylibCZIrw.*pip install '\.\[czi\]'"
    ):
        Slide(path)
