"""The fast path: OpenSlide's pixels, bit for bit, or OpenSlide itself."""

import gc

import numpy as np
import openslide
import pytest
import tifffile
from tifffile import COMPRESSION

from stages.common import tiff
from stages.common.slides import Slide
from tests.common.pyramids import APERIO, write

WRITERS = {
    "jpeg-rgb": {},
    "jpeg-422": {"photometric": "ycbcr", "subsampling": (2, 1)},
    "jpeg-420": {"photometric": "ycbcr", "subsampling": (2, 2)},
    "none": {"compression": None},
    "lzw": {"compression": "lzw", "predictor": True},
    "deflate": {"compression": "deflate"},
    "zstd": {"compression": "zstd"},
    "jpeg2000": {"compression": COMPRESSION.APERIO_JP2000_RGB},
}


def judge(slide: openslide.OpenSlide, corner, level: int, side: int) -> np.ndarray:
    """A region as OpenSlide reads it, on white."""
    region = np.asarray(slide.read_region(tuple(map(int, corner)), level, (side, side)))
    opaque = region[..., 3:] == 255
    assert (opaque | (region[..., 3:] == 0)).all()  # no blended pixels
    return np.where(opaque, region[..., :3], 255).astype(np.uint8)


def decoded(monkeypatch) -> list[tuple[int, int]]:
    """The tiles that are decoded from now on, (level, number)."""
    found: list[tuple[int, int]] = []
    real = tiff.Tiles.decode

    def spy(self, level, at):
        found.append((level, at))
        return real(self, level, at)

    monkeypatch.setattr(tiff.Tiles, "decode", spy)
    return found


def test_a_file_that_tifffile_refuses_is_let_go_of_without_a_word(tmp_path, capsys):
    (tmp_path / "a.tif").write_bytes(b"no TIFF")
    with pytest.raises(ValueError, match="not a TIFF file"):
        tiff.Tiles(tmp_path / "a.tif", [(1, 1)])
    gc.collect()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("description", [APERIO, None], ids=["aperio", "generic"])
@pytest.mark.parametrize("writer", WRITERS)
def test_patches_are_openslides_bit_for_bit(tmp_path, writer, description):
    if writer == "jpeg2000" and description is None:
        pytest.skip("OpenSlide reads Aperio's JPEG 2000 in Aperio's files only")
    path = write(tmp_path / "a.tif", (520, 700), description=description, **WRITERS[writer])
    rng = np.random.default_rng(1)
    with Slide(path, 0.25) as ours, openslide.OpenSlide(path) as theirs:
        for level, side in ((0, 301), (1, 97)):
            step = round(theirs.level_downsamples[level])
            corners = rng.integers(0, (700 // step, 520 // step), (12, 2)) * step
            for corner, patch in zip(
                corners, ours.patches(corners, side, 0.25 * step), strict=True
            ):
                assert np.array_equal(patch, judge(theirs, corner, level, side))
            assert ours._source._equal[level]  # it was the fast path


def test_a_strip_wider_than_openslides_blocks(tmp_path):
    path = write(tmp_path / "a.svs", (300, 9000))
    with Slide(path) as ours, openslide.OpenSlide(path) as theirs:
        strip = ours.read(8, 4, 8990, 290, 0.25)
        whole = np.asarray(theirs.read_region((8, 4), 0, (8990, 290)).convert("RGB"))
        assert np.array_equal(strip, whole)
        assert ours._source._equal == {0: True}


@pytest.mark.parametrize("stride_px", [256, 200, 128])
def test_a_dense_grid_decodes_each_tile_once(tmp_path, stride_px, monkeypatch):
    path = write(tmp_path / "a.svs")
    columns, rows = (np.arange(0, side - 255, stride_px) for side in (1400, 1000))
    corners = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    with Slide(path) as slide:
        next(slide.patches(corners[:1], 256, 0.25))  # compares samples with OpenSlide
        slide._source._tiles._kept.clear()
        seen = decoded(monkeypatch)
        assert sum(1 for _ in slide.patches(corners, 256, 0.25)) == len(corners)
        assert len(seen) == len(set(seen))
        assert not slide._source._tiles._kept  # each let go after the last patch that needs it


def test_memory_is_bounded_and_pixels_stay(tmp_path, monkeypatch):
    path = write(tmp_path / "a.svs")
    corners = np.random.default_rng(0).integers(0, 700, (40, 2))
    with Slide(path) as slide:
        free = list(slide.patches(corners, 256, 0.25))
        bound = 2 * 256 * 256 * 3
        monkeypatch.setattr(tiff, "CACHE_BYTES", bound)
        for patch, same in zip(slide.patches(corners, 256, 0.25), free, strict=True):
            assert np.array_equal(patch, same)
            tiles = slide._source._tiles
            assert sum(tile.nbytes for tile in tiles._kept.values()) == tiles._kept_bytes <= bound


def test_levels_between_pixels_are_left_to_openslide(tmp_path):
    path = write(tmp_path / "a.svs", (1001, 1402))  # a downsample of 4.004
    with Slide(path) as ours, openslide.OpenSlide(path) as theirs:
        corners = np.array([[0, 0], [501, 333]])
        for corner, patch in zip(corners, ours.patches(corners, 64, 1.001), strict=True):
            region = theirs.read_region(tuple(corner), 1, (64, 64))
            assert np.array_equal(patch, np.asarray(region.convert("RGB")))
        assert ours._source._equal == {1: False}


def test_an_overview_is_the_levels_own_pixels(tmp_path):
    """At the nearest whole pixel, where OpenSlide would blend; elsewhere it is what `read` has."""
    path = write(tmp_path / "a.svs", (2001, 3002))  # a downsample of 4.0023
    with tifffile.TiffFile(path) as opened:
        level = opened.pages[1].asarray()
    with Slide(path) as slide:
        step = slide._source.level_downsamples[1]
        for x0, y0 in ((0, 0), (801, 403), (2000, 1502)):
            x, y = round(x0 / step), round(y0 / step)
            seen = slide.overview(x0, y0, 90, 70, 0.25 * step)
            assert np.array_equal(seen, level[y : y + 70, x : x + 90])
        assert not np.array_equal(seen, slide.read(x0, y0, 90, 70, 0.25 * step))
        for place in ((33, 17, 90, 70, 0.25), (0, 0, 50, 50, 0.6)):
            assert np.array_equal(slide.overview(*place), slide.read(*place))


@pytest.mark.parametrize("off", [(0, 8, 0), (40, 0, 0)])
def test_an_overview_of_other_pixels_is_openslides(tmp_path, off, monkeypatch):
    path = write(tmp_path / "a.svs", (2001, 3002))
    real = tiff.Tiles.decode
    monkeypatch.setattr(
        tiff.Tiles, "decode", lambda *at: np.clip(real(*at).astype(int) + off, 0, 255)
    )
    with Slide(path) as slide:
        place = (801, 403, 90, 70, 0.25 * slide._source.level_downsamples[1])
        assert np.array_equal(slide.overview(*place), slide.read(*place))


def test_positions_between_pixels_are_left_to_openslide(tmp_path):
    path = write(tmp_path / "a.svs")
    with Slide(path) as ours, openslide.OpenSlide(path) as theirs:
        corners = np.array([[400, 400], [401, 402]])
        patches = list(ours.patches(corners, 64, 1.0))
        for corner, patch in zip(corners, patches, strict=True):
            region = theirs.read_region(tuple(map(int, corner)), 1, (64, 64))
            assert np.array_equal(patch, np.asarray(region.convert("RGB")))


def test_a_decoder_that_differs_is_not_used(tmp_path, monkeypatch):
    path = write(tmp_path / "a.svs")
    real = tiff.Tiles.decode
    monkeypatch.setattr(
        tiff.Tiles, "decode", lambda self, level, at: real(self, level, at) ^ np.uint8(1)
    )
    with Slide(path) as ours, openslide.OpenSlide(path) as theirs:
        patch = next(ours.patches(np.array([[100, 100]]), 256, 0.25))
        assert np.array_equal(patch, judge(theirs, (100, 100), 0, 256))


def test_absent_tiles_are_openslides(tmp_path):
    path = write(tmp_path / "a.tif", description=None)
    with tifffile.TiffFile(path, mode="r+b") as opened:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = opened.pages[0].tags[name]
            tag.overwrite([0 if at == 7 else value for at, value in enumerate(tag.value)])
    with Slide(path, 0.25) as ours, openslide.OpenSlide(path) as theirs:
        corners = np.array([[0, 0], [200, 200], [256, 256], [300, 300]])
        for corner, patch in zip(corners, ours.patches(corners, 256, 0.25), strict=True):
            assert np.array_equal(patch, judge(theirs, corner, 0, 256))
        assert (patch[:200, :200] == 255).all()
        assert ours._source._equal == {0: True}


@pytest.mark.parametrize("writer", ["jpeg-rgb", "jpeg-420", "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_tile_is_judged_by_openslide(tmp_path, writer, seed):
    """Its error, or its pixels: never others."""
    path = write(tmp_path / "a.svs", (600, 600), (1,), **WRITERS[writer])
    with tifffile.TiffFile(path) as opened:
        start, length = (
            opened.pages[0].dataoffsets[4],
            opened.pages[0].databytecounts[4],
        )
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(length // 8, length - 2, 3):
        content[start + at] = (255, rng.integers(256))[seed % 2]
    path.write_bytes(content)
    corners = np.array([[0, 0], [200, 200]])
    with openslide.OpenSlide(path) as theirs:
        try:
            wanted = [judge(theirs, corner, 0, 256) for corner in corners]
        except openslide.OpenSlideError:
            wanted = None
    with Slide(path) as ours:
        if wanted is None:
            with pytest.raises(ValueError, match=r"slide a\.svs is damaged at"):
                list(ours.patches(corners, 256, 0.25))
        else:
            for patch, right in zip(ours.patches(corners, 256, 0.25), wanted, strict=True):
                assert np.array_equal(patch, right)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff"])
def test_a_real_slide(shared_data, name, monkeypatch):
    path = shared_data / "wsi" / name
    corners = np.random.default_rng(0).integers(0, (2220, 2967), (30, 2))
    seen = decoded(monkeypatch)
    with Slide(path, 0.499) as ours, openslide.OpenSlide(path) as theirs:
        for corner, patch in zip(corners, ours.patches(corners, 256, 0.499), strict=True):
            assert np.array_equal(patch, judge(theirs, corner, 0, 256))
    assert len(seen) > 50


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_real_slide_cut_short(shared_data, tmp_path, share):
    whole = (shared_data / "wsi" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(share * len(whole))])
    corners = np.stack(np.meshgrid(np.arange(0, 1900, 256), np.arange(0, 2700, 256)), -1)
    with pytest.raises(ValueError, match=r"slide cut\.svs is damaged"):  # noqa: SIM117
        with Slide(path, 0.499) as slide:
            list(slide.patches(corners.reshape(-1, 2), 256, 0.499))
