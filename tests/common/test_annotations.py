"""Annotation files that are wrong, or could be read in two ways: CSV, VOC, and paths of images."""

import os
from pathlib import Path

import pytest

from stages.common import annotations
from tests.stages.annotated import as_voc, draw_images, refused


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"row 1 is nothing: it must name path,x,y or"),
        ("file,x,y\na.png,1,2\n", r"row 1 is file, x, y: it must name path"),
        ("path,x,y,x\na.png,1,2,3\n", r"column x is there twice"),
        ("path,x,y\na.png,1,2\na.png,one,2\n", r"row 3, column x is 'one': it must be a number"),
        ("path,x,y\na.png,1,nan\n", r"row 2, column y is 'nan'"),
        ("path,x,y\na.png,1\n", r"row 2 has 2 fields: it must have 3"),
        ("path,x,y\n,1,2\n", r"row 2: path is empty"),
        ("path,x0,y0,x1,y1\na.png,9,1,5,5\n", r"row 2: the box ends before it begins"),
        ("path,x,y\n../secret.png,1,2\n", r"'../secret.png' leads out of"),
        ("path,x,y\n/etc/passwd,1,2\n", r"leads out of"),
        ("path,x,y\na.png,1,2\n./a.png,1,2\n", r"./a.png and a.png are one image"),
        ("path,x,y\n", r"names no image"),
        ("path;x;y\na.png;1;2\n", r"row 1 is path;x;y: .* between commas"),
        ("path,x,y,w,h\na.png,1,2,3,4\n", r"names x,y and h,w: x,y may be a corner or the centre"),
        ("path,x,y,Width,Height\na.png,1,2,3,4\n", r"names x,y and height,width"),
        ("path,x,y\na.png,1e308,2\n", r"row 2, column x is '1e308'"),
        ("path,x,y\na.png,4_0,2\n", r"column x is '4_0'"),
        ("path,x,y\na.png,4,2\nb.png,4,2\na.png,4,2\n", r"2 nuclei at x 4, y 2 of image a.png"),
        (f"path,x,y\n{'a' * 5000},1,2\n", r"truth.csv: 'a{100}' is no path .*name too long"),
    ],
)
def test_names_what_is_wrong_with_a_csv(content, message, images, tmp_path):
    (tmp_path / "truth.csv").write_text(content)
    refused(tmp_path / "truth.csv", images, message)


def test_names_the_first_missing_images(images, tmp_path):
    names = [f"gone{number}.png" for number in range(7)]
    rows = "\n".join(f"{name},1,2" for name in [*names, "a.png"])
    (tmp_path / "truth.csv").write_text(f"path,x,y\n{rows}\n")
    refused(
        tmp_path / "truth.csv",
        images,
        r"7 of 8 images are not in .*: gone0.png, .*gone4.png, \.\.\.; --images must",
        FileNotFoundError,
    )
    refused(tmp_path / "no.csv", images, "no annotations", FileNotFoundError)
    refused(tmp_path / "truth.csv", tmp_path / "no", "no folder", FileNotFoundError)


def test_refuses_a_link_out_of_the_folder(images, tmp_path):
    (tmp_path / "out.png").write_bytes((images / "a.png").read_bytes())
    os.symlink(tmp_path / "out.png", images / "link.png")
    (tmp_path / "truth.csv").write_text("path,x,y\nlink.png,1,2\n")
    refused(tmp_path / "truth.csv", images, "leads out of")


def test_keeps_classes_and_counts_images_without_them(images, tmp_path):
    text = "path,x,y,cls\na.png,1,2,WBC\na.png,3,4,RBC\nb.png,5,6,RBC\n"
    (tmp_path / "truth.csv").write_text(text)
    truth = annotations.read(tmp_path / "truth.csv", images, ["WBC"])
    assert [len(image.points) for image in truth.images] == [1, 0]
    assert truth.seen == {"RBC": 2, "WBC": 1}
    refused(
        tmp_path / "truth.csv", images, "no class 'wbc': its nuclei are RBC, WBC", classes=["wbc"]
    )
    (tmp_path / "plain.csv").write_text("path,x,y\na.png,,\n")
    assert len(annotations.read(tmp_path / "plain.csv", images).images[0].points) == 0
    refused(tmp_path / "plain.csv", images, "its nuclei are without classes", classes=["WBC"])


def test_refuses_xml_that_defines_entities(images, tmp_path):
    """The billion laughs, and a file of the machine's: both start with a DOCTYPE."""
    folder = tmp_path / "voc"
    folder.mkdir()
    for body in ('<!ENTITY a "ha"><!ENTITY b "&a;&a;">', '<!ENTITY b SYSTEM "file:///etc/passwd">'):
        text = f"<!DOCTYPE x [{body}]><annotation><filename>&b;</filename></annotation>"
        (folder / "a.xml").write_text(text)
        refused(folder, images, r"a.xml has a DOCTYPE.*remove it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", r"a.xml is no XML: no element found"),
        ("<svg/>", r"is <svg>: it must be <annotation>"),
        ("<annotation/>", r"has no filename"),
        (
            "<annotation><filename>a.png</filename><object><name>n</name><bndbox><xmin>4</xmin>"
            "<ymin>x</ymin></bndbox></object></annotation>",
            r"object 1, ymin is 'x'",
        ),
    ],
)
def test_names_what_is_wrong_with_voc(content, message, images, tmp_path):
    folder = tmp_path / "voc"
    folder.mkdir()
    (folder / "a.xml").write_text(content)
    refused(folder, images, message)


def test_refuses_two_files_for_one_image_and_mixed_folders(images, tmp_path):
    folder = as_voc(tmp_path)
    (folder / "again.xml").write_text((folder / "a.xml").read_text())
    refused(folder, images, r"both annotate a.png")
    (folder / "notes.txt").write_text("")
    refused(folder, images, r"holds .txt, .xml: it must hold .xml")
    (tmp_path / "truth.txt").write_text("")
    refused(tmp_path / "truth.txt", images, r"is no .json \(COCO\) and no .csv")


def test_reads_a_table_with_blanks_boxes_and_empty_classes(images, tmp_path):
    """Points serve where boxes are there too; a class that is not told is one of its own."""
    text = 'x, path, y, x0, y0, x1, y1, w, h, cls\n4, "a.png", 5, 1, 1, 3, 3, 2, 2,\n'
    (tmp_path / "truth.csv").write_text(text)
    truth = annotations.read(tmp_path / "truth.csv", images)
    assert truth.images[0].points.tolist() == [[4.0, 5.0]] and truth.seen == {"(none)": 1}


BOX = (
    "<object><name>n</name><bndbox><xmin>33</xmin><ymin>33</ymin><xmax>48</xmax><ymax>48</ymax>"
    "</bndbox></object>"
)


def voc_of(tmp_path: Path, text: str | bytes) -> Path:
    (tmp_path / "voc").mkdir(exist_ok=True)
    (tmp_path / "voc" / "a.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / "voc"


def test_finds_the_image_of_a_voc_name_without_suffix(images, tmp_path):
    folder = voc_of(tmp_path, f"<annotation><filename>a</filename>{BOX}</annotation>")
    found = annotations.read(folder, images).images
    assert [(one.name, one.points.tolist()) for one in found] == [("a.png", [[40.0, 40.0]])]
    (images / "a.jpg").write_bytes((images / "a.png").read_bytes())
    refused(folder, images, r"a.xml: filename a may be a.jpg or a.png: write the suffix")
    voc_of(tmp_path, f"<annotation><filename>../a</filename>{BOX}</annotation>")
    refused(folder, images, r"leads out of")


@pytest.mark.parametrize("coding", ["shift_jis", "utf-7", "bogus"])
def test_names_the_file_of_an_encoding_that_is_not_known(coding, images, tmp_path):
    text = f'<?xml version="1.0" encoding="{coding}"?><annotation/>'
    refused(voc_of(tmp_path, text), images, r"a.xml is no XML: .*in UTF-8")


def test_reads_utf_16_and_refuses_boxes_that_come_twice(images, tmp_path):
    text = f"<annotation><filename>a.png</filename>{BOX}</annotation>"
    folder = voc_of(tmp_path, ('<?xml version="1.0" encoding="utf-16"?>' + text).encode("utf-16"))
    assert len(annotations.read(folder, images).images[0].points) == 1
    refused(voc_of(tmp_path, text.replace(BOX, BOX * 2)), images, r"voc has 2 nuclei at x 40, y 40")


@pytest.mark.parametrize("width", ["211.5", "-211", "many"])
def test_refuses_a_size_that_is_no_number_of_pixels(width, images, tmp_path):
    size = f"<size><width>{width}</width><height>179</height></size>"
    folder = voc_of(tmp_path, f"<annotation><filename>a.png</filename>{size}</annotation>")
    refused(folder, images, rf"a.xml: size, width is '{width}': it must be a")
