"""Slides as they arrive: cut short, unreadable, vanished, oddly named, of closed formats."""

import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile

from stages.common.slides import Slide
from tests.common.pyramids import texture, write


@pytest.mark.parametrize("suffix", ["kfb", "sdpc", "tmap", "tron", "isyntax"])
def test_closed_formats_name_a_converter(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"closed")
    message = rf"a\.{suffix} is of a format that no reader here knows: convert it with \w.*readers/"
    with pytest.raises(ValueError, match=message):
        Slide(path, 0.25)


@pytest.mark.parametrize("offset", [0, 8, 1 << 30])
def test_a_pyramid_without_levels(tmp_path, offset):
    """A TIFF header whose first directory is absent, empty, or beyond the end."""
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHIHI", b"II", 42, offset, 0, 0))
    with pytest.raises(ValueError, match=r"slide a\.tif is damaged"):
        Slide(path, 0.25)
    path.rename(tmp_path / "a.svs")
    with pytest.raises(ValueError, match=r"slide a\.svs is damaged"):
        Slide(tmp_path / "a.svs", 0.25)


def test_a_variant_that_openslide_does_not_read(tmp_path):
    path = write(tmp_path / "a.tif", (300, 300), (1,), compression="webp")
    with pytest.raises(ValueError, match=r"a\.tif is damaged or of a variant .*50001.* convert it"):
        Slide(path, 0.25)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs another user to be")
def test_a_file_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = write(Path(place) / "a.svs", (300, 300), (1,))
        os.chmod(path, 0o600)
        closed = Path(place) / "closed"
        closed.mkdir(mode=0o700)
        shutil.copyfile(path, closed / "b.svs")
        os.seteuid(65534)
        try:
            for refused in (path, closed / "b.svs"):
                message = f"{refused.name} may not be read by this user: change its permissions"
                with pytest.raises(PermissionError, match=message):
                    Slide(refused)
        finally:
            os.seteuid(0)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permissions(tmp_path):
    path = write(tmp_path / "a.svs", (300, 300), (1,))
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"a\.svs may not be read by this user"):
        Slide(path)


def test_a_file_that_vanishes(tmp_path):
    path = write(tmp_path / "a.tif", (2000, 2000), (1,), description=None)
    with Slide(path, 0.25) as slide:
        corners = np.array([[x, y] for y in (0, 700, 1700) for x in (0, 800, 1700)])
        patches = slide.patches(corners, 256, 0.25)
        next(patches)
        path.write_bytes(b"")
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"a\.tif vanished while it was read: see to"):
            list(patches)


@pytest.mark.parametrize("name", ["S 01 (kopie).svs", "切片 ü.svs", "a'b\"c;d.svs"])
def test_names_with_spaces_and_unicode(tmp_path, name):
    folder = tmp_path / "Präparate 2024"
    folder.mkdir()
    with Slide(write(folder / name, (600, 600))) as slide:
        assert next(slide.patches(np.array([[40, 40]]), 256, 0.25)).std() > 10
        assert slide._source._equal == {0: True}


def png_of(width, height):
    """A PNG file that claims this extent, and has no pixels."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": b""}
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_plain_image_too_large_for_memory(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(40000, 40000))
    with pytest.raises(ValueError, match=r"a\.png is too large a plain image.* pyramidal TIFF"):
        Slide(path, 0.25)


def test_plain_images_end_in_white(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", texture(50, 60), photometric="rgb")
    with Slide(tmp_path / "a.tif", 0.25) as slide:
        region = slide.read(40, 30, 40, 40, 0.25)
    assert np.array_equal(region[:20, :20], texture(50, 60)[30:, 40:])
    assert (region[20:] == 255).all()
    assert (region[:, 20:] == 255).all()


def test_the_real_tiffs_wrong_mpp_is_refused_and_the_csvs_wins(shared_data):
    path = shared_data / "wsi" / "CMU-1-Small-Region.jpeg.tiff"
    with pytest.raises(ValueError, match=r"is said to be 0\.00499 mpp: it must lie between 0\.02"):
        Slide(path)
    with Slide(path, 0.499) as slide:
        assert slide.mpp == 0.499


def test_a_slide_without_a_pyramid_is_read_in_bands(tmp_path, monkeypatch):
    """What is averaged down from many pixels takes bounded memory and is as good as at once."""
    path = write(tmp_path / "a.svs", (2000, 1500), (1,))
    with Slide(path) as slide:
        whole = slide.thumbnail(130).astype(int)
        monkeypatch.setattr("stages.common.slides.BAND_PX", 200_000)
        extents = []
        real = type(slide._source).read

        def spy(self, x0, y0, level, width, height):
            extents.append((width, height))
            return real(self, x0, y0, level, width, height)

        monkeypatch.setattr(type(slide._source), "read", spy)
        banded = slide.thumbnail(130).astype(int)
    assert len(extents) > 10
    assert max(width * height for width, height in extents) < 1.2 * 200_000
    assert np.abs(banded - whole).max() <= 12
    assert np.abs(banded - whole).mean() < 1


# Of Tiles, which its own error left half made.
@pytest.mark.filterwarnings("ignore:.*Tiles.__del__:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tag", ["BitsPerSample", "SamplesPerPixel", "TileWidth"])
def test_a_tag_that_rotted_is_for_openslide_to_judge(tmp_path, tag):
    """Another type of one tag: tifffile ends in a TypeError, and OpenSlide reads the slide."""
    path = write(tmp_path / "a.svs", (600, 600), (1, 2))
    with Slide(path) as slide:
        right = slide.read(0, 0, 600, 600, 0.25)
    with tifffile.TiffFile(path) as opened:
        at = opened.pages[1].tags[tag].offset + 2
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with Slide(path) as slide:
        slide.probe()
        (patch,) = slide.patches(np.array([[0, 0]]), 600, 0.25)
        assert slide._source._tiles is None
    assert np.array_equal(patch, right)
