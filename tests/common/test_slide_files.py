"""Which files make a slide, and what is said of those that are missing."""

import shutil

import pytest

from stages.common import slide_files
from stages.common.slides import Slide

DICOM = "CMU-1-Small-Region-dicom"


def mirax(folder):
    """The files of an MRXS slide, without their content."""
    (folder / "a").mkdir()
    for name in ("a.mrxs", "a/Data0000.dat", "a/Index.dat", "a/Slidedat.ini"):
        (folder / name).write_bytes(b"x")
    return folder / "a.mrxs"


def hamamatsu(folder):
    """The index of a VMS slide, and some of the files that it names."""
    index = (
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=2\nNoJpegRows=1\n"
        "ImageFile=a.jpg\nImageFile(1,0)=a(1,0).jpg\nMapFile=a_map.jpg\nOptimisationFile=a.opt\n"
        "MacroImage=../outside.jpg\nDate=50%\n"
    )
    (folder / "a.vms").write_text(index)
    for name in ("a.jpg", "a(1,0).jpg", "a_map.jpg", "other.jpg"):
        (folder / name).write_bytes(b"x")
    return folder / "a.vms"


def test_mrxs_is_its_data_folder_too(tmp_path):
    path = mirax(tmp_path)
    names = [file.name for file in slide_files.content_files(path)]
    assert names == ["a.mrxs", "Data0000.dat", "Index.dat", "Slidedat.ini"]
    assert slide_files.entry_file(tmp_path / "a") == path


def test_mrxs_without_its_data_folder(tmp_path):
    path = mirax(tmp_path)
    shutil.rmtree(tmp_path / "a")
    message = r"slide a\.mrxs has no folder a with its Slidedat\.ini .* beside it: copy that too"
    with pytest.raises(FileNotFoundError, match=message):
        Slide(path)


def test_vms_is_every_file_it_names(tmp_path):
    names = [file.name for file in slide_files.content_files(hamamatsu(tmp_path))]
    assert names == ["a.vms", "a(1,0).jpg", "a.jpg", "a_map.jpg"]


def test_vms_with_a_file_missing(tmp_path):
    path = hamamatsu(tmp_path)
    (tmp_path / "a(1,0).jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"slide a\.vms has no a\(1,0\)\.jpg beside it"):
        Slide(path)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"slide a\.vms is damaged, not an index of files"):
        Slide(path)


def test_dicom_files_of_any_name(shared_data, tmp_path):
    folder = tmp_path / "slide 1"
    folder.mkdir()
    for at, file in enumerate(sorted((shared_data / "wsi" / DICOM).glob("*.dcm"))):
        shutil.copyfile(file, folder / f"IM{at:05d}")
    (folder / "DICOMDIR.txt").write_text("an index")
    path = slide_files.entry_file(folder)
    assert path.name == "IM00000"
    assert len(slide_files.content_files(path)) == 4
    with Slide(path) as slide:
        assert (slide.width_px, slide.height_px) == (2220, 2967)
        slide.probe()


def test_two_dicom_slides_in_one_folder(shared_data, tmp_path):
    files = sorted((shared_data / "wsi" / DICOM).glob("*.dcm"))
    (own,) = slide_files._series(files[0])
    other = own[:-1] + (b"1" if own[-1:] != b"1" else b"2")
    for file in files:
        shutil.copyfile(file, tmp_path / f"a{file.name}")
        (tmp_path / f"b{file.name}").write_bytes(file.read_bytes().replace(own, other))
    with pytest.raises(ValueError, match="holds several slides: name a .dcm file of each"):
        slide_files.entry_file(tmp_path)
    for letter in "ab":
        found = slide_files.content_files(tmp_path / f"{letter}{files[0].name}")
        assert [file.name[0] for file in found] == [letter] * 4


def test_a_single_file_is_its_own_content(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "b.svs").write_bytes(b"x")
    assert slide_files.content_files(tmp_path / "a.svs") == [tmp_path / "a.svs"]


def test_each_file_of_a_flat_dicom_folder_is_read_once_for_all_slides(tmp_path, monkeypatch):
    names = [f"{at:02d}.dcm" for at in range(40)]
    for at, name in enumerate(names):
        tag = b"\x20\x00\x0e\x00UI\x04\x001.%02d" % (at // 2)
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + tag)
    asked, real = [], slide_files._series
    monkeypatch.setattr(slide_files, "_series", lambda file: asked.append(file) or real(file))
    for at, name in enumerate(names):
        found = slide_files.content_files(tmp_path / name)
        assert [file.name for file in found] == names[at // 2 * 2 : at // 2 * 2 + 2]
    assert len(asked) <= 2 * len(names)
    (tmp_path / names[1]).unlink()
    assert [file.name for file in slide_files.content_files(tmp_path / names[0])] == names[:1]
