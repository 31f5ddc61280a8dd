import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from stages.common import slide_files, slides


def pyramid(path, mpp=0.25, side=1024):
    """Four quarters of known colours, two levels, Aperio's header."""
    base = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    base[:half, :half], base[:half, half:] = (200, 30, 30), (30, 200, 30)
    base[half:, :half], base[half:, half:] = (30, 30, 200), (200, 200, 30)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(base, description=f"Aperio\n|AppMag = 40|MPP = {mpp}", **options)
        tiff.write(base[::4, ::4], subfiletype=1, **options)
    return path


def test_reads_at_the_mpp_asked_for(tmp_path):
    slide = slides.Slide(pyramid(tmp_path / "a.svs"))
    assert (slide.mpp, slide.width_px, slide.height_px) == (0.25, 1024, 1024)
    for mpp in (0.25, 0.5, 0.7, 1.0, 1.9):
        step = mpp / 0.25
        patch = slide.read(512, 0, int(512 / step), int(1024 / step), mpp)
        assert patch.shape == (int(1024 / step), int(512 / step), 3)
        upper, lower = patch[2 : patch.shape[0] // 2 - 4], patch[patch.shape[0] // 2 + 4 :]
        assert np.abs(upper[:, 3:-3].astype(int) - (30, 200, 30)).max() < 12
        assert np.abs(lower[:, 3:-3].astype(int) - (200, 200, 30)).max() < 12


def test_level_0_pixels_are_the_files(tmp_path):
    import openslide

    path = pyramid(tmp_path / "a.svs")
    ours = slides.Slide(path).read(500, 499, 37, 41, 0.25)
    judge = openslide.OpenSlide(path).read_region((500, 499), 0, (37, 41))
    assert np.array_equal(ours, np.asarray(judge.convert("RGB")))


def test_a_given_mpp_overrides_the_file(tmp_path):
    assert slides.Slide(pyramid(tmp_path / "a.svs"), 0.5).mpp == 0.5


def test_outside_of_the_slide_is_background(tmp_path):
    patch = slides.Slide(pyramid(tmp_path / "a.svs")).read(1000, 1000, 48, 48, 0.25)
    assert (patch[30:, 30:] == 255).all()


def test_plain_images_are_slides_of_one_level(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "field.png")
    slide = slides.Slide(tmp_path / "field.png", 0.1)
    assert (slide.width_px, slide.height_px) == (71, 53)
    assert np.array_equal(slide.read(11, 7, 13, 17, 0.1), pixels[7:24, 11:24])
    assert slide.read(0, 0, 35, 26, 0.2).shape == (26, 35, 3)


def test_gray_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (20, 20), 77).save(tmp_path / "gray.png")
    assert (slides.Slide(tmp_path / "gray.png", 0.1).read(0, 0, 5, 5, 0.1) == 77).all()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (slides.Slide(tmp_path / "clear.png", 0.1).read(0, 0, 5, 5, 0.1) == 255).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zero.svs", b"", "zero.svs has 0 bytes: copy it again"),
        ("text.svs", b"hello", "text.svs is damaged"),
        ("text.jpg", b"hello", "text.jpg is damaged or of no format"),
    ],
)
def test_refuses_what_is_no_slide(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        slides.Slide(tmp_path / name, 0.25)


def test_refuses_formats_that_start_programs(tmp_path):
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="of no format"):
        slides.Slide(tmp_path / "a.eps", 0.25)


def test_a_photo_stands_upright_as_viewers_show_it(tmp_path):
    upright = np.random.default_rng(0).integers(0, 255, (7, 11, 3), np.uint8)
    turned, exif = Image.fromarray(np.rot90(upright)), Image.Exif()
    exif[274] = 6  # to be turned clockwise
    turned.save(tmp_path / "photo.png", exif=exif)
    slide = slides.Slide(tmp_path / "photo.png", 0.5)
    assert (slide.width_px, slide.height_px) == (11, 7)
    assert np.array_equal(slide.read(0, 0, 11, 7, 0.5), upright)


def test_refuses_16_bits(tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((9, 9, 3), np.uint16), photometric="rgb")
    with pytest.raises(ValueError, match="16 or 32 bits a channel"):
        slides.Slide(tmp_path / "deep.tif", 0.25)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="16 or 32 bits a channel"):
        slides.Slide(tmp_path / "deep.png", 0.5)
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((9, 9, 3), 4095, np.uint16))
    with pytest.raises(ValueError, match="16 or 32 bits a channel"):
        slides.Slide(tmp_path / "deep.png", 0.25)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_slide_is_damaged(tmp_path, share):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            noise,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            description="Aperio\n|AppMag = 40|MPP = 0.25",
            metadata=None,
        )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="slide a.svs is damaged"):
        slides.Slide(path).probe()


def test_mpp_must_be_known_plausible_and_not_finer(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "field.png")
    with pytest.raises(ValueError, match="has no mpp in its metadata: give it in the labels file"):
        slides.Slide(tmp_path / "field.png")
    with pytest.raises(ValueError, match="is said to be 0.00499 mpp"):
        slides.Slide(tmp_path / "field.png", 0.00499)
    slide = slides.Slide(tmp_path / "field.png", 0.5)
    slide.check_mpp(0.5)
    slide.check_mpp(0.49)  # within what scanners of one nominal mpp differ by
    with pytest.raises(ValueError, match="is 0.5 mpp, and 0.25 mpp patches would be invented"):
        slide.check_mpp(0.25)


def test_missing_files_and_empty_dicom_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no slide file .*a\.svs"):
        slides.Slide(tmp_path / "a.svs")
    with pytest.raises(ValueError, match="a folder without .dcm files"):
        slide_files.entry_file(tmp_path)


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff", "CMU-1-Small-Region-dicom"]
)
def test_one_real_slide_in_three_formats_reads_alike(shared_data, name):
    path = slide_files.entry_file(shared_data / "wsi" / name)
    slide = slides.Slide(path, 0.499)
    assert (slide.width_px, slide.height_px) == (2220, 2967)
    judge = slides.Slide(shared_data / "wsi" / "CMU-1-Small-Region.svs")
    region = slide.read(900, 1200, 256, 256, 0.499).astype(int)
    shifts = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    errors = {
        (dx, dy): np.abs(region - judge.read(900 + dx, 1200 + dy, 256, 256, 0.499)).mean()
        for dx, dy in shifts
    }
    assert min(errors, key=errors.get) == (0, 0)  # the files were compressed anew, not moved
    pixels = judge.read(900, 1200, 256, 256, 0.499)
    assert np.corrcoef(region.ravel(), pixels.ravel())[0, 1] > 0.97


def test_dicom_and_mrxs_content_is_all_their_files(shared_data, tmp_path):
    entry = slide_files.entry_file(shared_data / "wsi" / "CMU-1-Small-Region-dicom")
    assert len(slide_files.content_files(entry)) == 4
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Data0000.dat", "a/Slidedat.ini"):
        (tmp_path / name).touch()
    assert len(slide_files.content_files(tmp_path / "a.mrxs")) == 3
