"""Scoring on annotated images: every format by hand, intervals by definition, bad input."""

import csv
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from stages import detect_score
from stages.common import annotations, coco
from stages.detectors import Detection, _score, _windows
from stages.detectors._score import Counts

ROOT = Path(__file__).resolve().parents[2]
GROUND, NUCLEUS = (235, 230, 238), (62, 50, 110)
# Centres in pixels at 0.5 mpp, 31 um and more apart.
SPOTS = {"a.png": [(40, 45), (120, 50), (60, 150)], "b.png": [(100, 101)]}
SHAPE = (179, 211)  # height, width


@pytest.fixture
def images(tmp_path) -> Path:
    """Two fields with four drawn nuclei of 3.5 um."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, spots in SPOTS.items():
        image = np.full((*SHAPE, 3), GROUND, np.uint8)
        for x, y in spots:
            cv2.circle(image, (x, y), 7, NUCLEUS, -1, cv2.LINE_AA)
        Image.fromarray(image).save(folder / name)
    return folder


# One is annotated off its place, one more where nothing is: of 4 found, 3 are hits, 2 missed.
TRUTH = {"a.png": [(41, 44), (119, 51), (60, 130)], "b.png": [(100, 100), (30, 31)]}


def as_csv(folder: Path, columns: str = "x,y") -> Path:
    file = folder / "truth.csv"
    lines = [f"path,{columns},cls"]
    for name, points in TRUTH.items():
        for x, y in points:
            place = f"{x + 0.5},{y + 0.5}"
            box = f"{x - 5},{y - 4},{x + 6},{y + 5}"
            lines.append(f"{name},{place if columns == 'x,y' else box},nucleus")
    file.write_text("\n".join(lines) + "\n")
    return file


def as_coco(folder: Path, shape: str) -> Path:
    images, entries = [], []
    for number, (name, points) in enumerate(TRUTH.items()):
        height, width = SHAPE
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for x, y in points:
            entry = {"id": len(entries), "image_id": number, "category_id": 7}
            if shape == "box":
                entry["bbox"] = [x - 5, y - 4, 11, 9]
            elif shape == "polygon":
                corners = [x - 5, y - 4, x + 6, y - 4, x + 6, y + 5, x - 5, y + 5]
                entry |= {"segmentation": [corners], "bbox": [0, 0, 1, 1]}
            else:
                entry["segmentation"] = runs_of(square(x, y), shape == "packed")
            entries.append(entry)
    content = {"images": images, "annotations": entries}
    content["categories"] = [{"id": 7, "name": "nucleus"}]
    file = folder / "truth.json"
    file.write_text(json.dumps(content))
    return file


def square(x: int, y: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[y - 4 : y + 5, x - 5 : x + 6] = 1
    return mask


def runs_of(mask: np.ndarray, packed: bool) -> dict:
    """COCO's run lengths, down the columns, by definition; packed as pycocotools' rleToString."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    text = ""
    for at, count in enumerate(counts):
        left = count - (counts[at - 2] if at > 2 else 0)
        more = True
        while more:
            bits, left = left & 31, left >> 5
            more = left != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return {"size": list(mask.shape), "counts": text if packed else counts}


def as_voc(folder: Path) -> Path:
    target = folder / "voc"
    target.mkdir()
    for name, points in TRUTH.items():
        things = "".join(
            f"<object><name>nucleus</name><bndbox><xmin>{x - 4}</xmin><ymin>{y - 3}</ymin>"
            f"<xmax>{x + 6}</xmax><ymax>{y + 5}</ymax></bndbox></object>"
            for x, y in points
        )
        extent = f"<size><width>{SHAPE[1]}</width><height>{SHAPE[0]}</height></size>"
        text = f"<annotation><filename>{name}</filename>{extent}{things}</annotation>"
        (target / name.replace(".png", ".xml")).write_text(text)
    return target


def as_masks(folder: Path, suffix: str, binary: bool, dtype: type = np.uint16) -> Path:
    target = folder / "masks"
    target.mkdir()
    for name, points in TRUTH.items():
        mask = np.zeros(SHAPE, dtype)
        for label, (x, y) in enumerate(points, start=1):
            mask[square(x, y) > 0] = 255 if binary else 3 * label
        Image.fromarray(mask).save((target / name).with_suffix(suffix))
    return target


FORMATS = {
    "CSV of points": as_csv,
    "CSV of boxes": lambda folder: as_csv(folder, "x0,y0,x1,y1"),
    "COCO boxes": lambda folder: as_coco(folder, "box"),
    "COCO polygons": lambda folder: as_coco(folder, "polygon"),
    "COCO runs": lambda folder: as_coco(folder, "runs"),
    "COCO packed runs": lambda folder: as_coco(folder, "packed"),
    "VOC": as_voc,
    "labels": lambda folder: as_masks(folder, ".png", binary=False),
    "labels of 32 bits": lambda folder: as_masks(folder, ".tif", False, np.int32),
    "binary": lambda folder: as_masks(folder, ".tif", binary=True, dtype=np.uint8),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_centres_and_the_counts_by_hand(
    form, images, tmp_path, monkeypatch
):
    """Through the whole command: centres to the pixel, then counts, rates and pictures."""
    source = FORMATS[form](tmp_path)
    for image in annotations.read(source, images).images:
        found = image.points[np.lexsort(image.points.T)]
        wanted = np.array(TRUTH[image.name]) + 0.5
        np.testing.assert_allclose(found, wanted[np.lexsort(wanted.T)], atol=1e-9)
    monkeypatch.chdir(ROOT)
    target = tmp_path / "scores"
    detect_score.main(
        [str(source), "--images", str(images), "--mpp", "0.5", "--target", str(target)]
    )
    rows = list(csv.DictReader((target / "scores.csv").read_text().splitlines()))
    assert [(row["image"], row["tp"], row["fp"], row["fn"]) for row in rows] == [
        ("a.png", "2", "1", "1"),
        ("b.png", "1", "0", "1"),
    ]
    area = 179 * 211 * 0.25e-6
    assert float(rows[0]["false_per_mm2"]) == pytest.approx(1 / area)
    metrics = json.loads((target / "metrics.json").read_text())
    assert (metrics["tp"], metrics["fp"], metrics["fn"]) == (3, 1, 2)
    assert metrics["area_mm2"] == pytest.approx(2 * area)
    pooled, macro = metrics["pooled"], metrics["macro"]
    assert pooled["precision"]["value"] == pytest.approx(3 / 4)
    assert pooled["recall"]["value"] == pytest.approx(3 / 5)
    assert pooled["f1"]["value"] == pytest.approx(2 / 3)
    assert macro["f1"]["value"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert macro["precision"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert pooled["false_per_mm2"]["value"] == pytest.approx(1 / (2 * area))
    with Image.open(target / "gallery.jpg") as gallery:
        assert gallery.width >= 800 and gallery.height >= 400


# matching


def test_pairs_are_the_most_and_of_those_the_closest():
    """Against the dense assignment, whose costs put a pair above any distance."""
    rng = np.random.default_rng(11)
    for _ in range(200):
        first, second = (rng.uniform(0, 9, (rng.integers(1, 24), 2)) for _ in range(2))
        distance = cdist(first, second)
        reward = np.where(distance <= 2, 1000 - distance, 0)
        rows, columns = linear_sum_assignment(reward, maximize=True)
        near = distance[rows, columns] <= 2
        found = _score.pairs(first, second, 2.0)
        assert len(found) == near.sum()
        assert len(set(found[:, 0].tolist())) == len(set(found[:, 1].tolist())) == len(found)
        ours = distance[found[:, 0], found[:, 1]]
        assert ours.sum() == pytest.approx(distance[rows, columns][near].sum(), abs=1e-9)


def test_pairs_a_point_on_a_point_and_prefers_it():
    points = np.array([[5.0, 5], [6, 5], [4, 5]])
    assert _score.pairs(points, points[::-1].copy(), 3.0).tolist() == [[0, 2], [1, 1], [2, 0]]
    assert _score.pairs(points[:0], points, 3.0).shape == (0, 2)


def test_matches_five_thousand_in_a_crowd():
    """Every point has forty within the radius; the truth, shifted a little, is found again."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 627, (5000, 2))
    order = rng.permutation(5000)
    found = _score.pairs(truth[order] + 1e-4, truth, 31.7)
    assert np.array_equal(found[:, 1], order)


# intervals


def test_intervals_are_percentiles_over_resampled_images():
    counts = [Counts(3, 4, 6), Counts(0, 0, 2), Counts(5, 9, 5), Counts(0, 0, 0), Counts(2, 3, 2)]
    areas = [0.1, 0.2, 0.1, 0.3, 0.05]
    summary = _score.summarise(counts, areas, seed=3)
    generator = np.random.default_rng(3)
    pooled, macro = [], []
    for _ in range(_score.RESAMPLES):
        drawn = generator.integers(len(counts), size=len(counts)).tolist()
        total = Counts(0, 0, 0)
        for at in drawn:
            total += counts[at]
        false = total.found - total.matched
        pooled.append((total.precision, total.f1, false / sum(areas[at] for at in drawn)))
        macro.append(
            (
                np.mean([counts[at].precision for at in drawn]),
                np.mean([counts[at].f1 for at in drawn]),
                np.mean([(counts[at].found - counts[at].matched) / areas[at] for at in drawn]),
            )
        )
    for way, draws in (("pooled", pooled), ("macro", macro)):
        for name, column in zip(
            ("precision", "f1", "false_per_mm2"), np.array(draws).T, strict=True
        ):
            low, high = np.percentile(column, [2.5, 97.5])
            assert summary[way][name]["low"] == pytest.approx(low, abs=1e-12)
            assert summary[way][name]["high"] == pytest.approx(high, abs=1e-12)
            assert low < summary[way][name]["value"] < high
    assert summary == _score.summarise(counts, areas, seed=3)


# large images


class Dots:
    """Finds dark pixels, one each, and says which window saw it by nothing."""

    version, device = "dots", "cpu"

    def __call__(self, patches, mpp):
        y, x = np.nonzero(patches[0, ..., 0] < 99)
        centres = np.stack([x, y], axis=1).astype(np.float32) + 0.5
        ones = np.ones(len(x), np.float32)
        return [Detection(centres, 2 * ones, ones, [centre[None] for centre in centres])]


def test_windows_give_each_nucleus_of_a_large_image_once():
    rng = np.random.default_rng(2)
    grid = np.stack(np.meshgrid(np.arange(3, 2531, 13), np.arange(4, 1801, 13)), -1).reshape(-1, 2)
    points = np.unique(grid + rng.integers(-2, 3, grid.shape), axis=0)
    image = np.full((1811, 2539, 3), 255, np.uint8)
    image[points[:, 1], points[:, 0]] = 0
    seen = []

    def read(x0, y0, width, height):
        seen.append((width, height))
        return image[y0 : y0 + height, x0 : x0 + width]

    found = _windows.detect(read, 2539, 1811, 0.5, Dots())
    assert len(seen) > 4 and set(seen) == {(1024, 1024)}
    order = np.lexsort(found.centroid_px.T)
    assert np.array_equal(found.centroid_px[order], points[np.lexsort(points.T)] + 0.5)
    assert np.array_equal(np.concatenate(found.outline_px), found.centroid_px)


# bad input


def refused(source: Path, images: Path, message: str, error: type = ValueError, classes=()):
    with pytest.raises(error, match=message):
        annotations.read(source, images, classes)


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


IMAGE = {"id": 1, "file_name": "a.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list 'images': it must be COCO"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no file_name"),
        ({"images": [IMAGE, IMAGE], "annotations": []}, r"images\[1\]: id 1 is there twice"),
        ({"images": [IMAGE], "annotations": [{"image_id": 2}]}, "image_id is 2: no image"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, r"bbox is None: it must be 4"),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "segmentation": [[1, 2, 3]]}]},
            "has 3 numbers",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "iscrowd": 1, "bbox": [1] * 4}]},
            "is a crowd",
        ),
        (
            {
                "images": [IMAGE],
                "annotations": [{"image_id": 1, "segmentation": {"size": [3, 5], "counts": [9]}}],
            },
            r"runs that do not fill its size \[3, 5\]",
        ),
    ],
)
def test_names_what_is_wrong_with_coco(content, message, images, tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    refused(tmp_path / "truth.json", images, message)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"images": 1e999}', "\udcff"])
def test_refuses_what_is_no_json(text, images, tmp_path):
    (tmp_path / "truth.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path / "truth.json", images, "truth.json (is no JSON|has no list)")


def test_centroid_of_runs_and_polygons_by_definition():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = (rng.uniform(size=(7, 11)) < 0.4).astype(np.uint8)
        mask[0, :2] = rng.integers(0, 2, 2)
        mask[3, 3] = 1
        runs = runs_of(mask, packed=False)
        if mask[0, 0]:
            runs["counts"] = [0, *runs["counts"]]
        y, x = np.nonzero(mask)
        assert coco._of_runs(runs, "") == pytest.approx((x.mean() + 0.5, y.mean() + 0.5))
    two = [[0, 0, 4, 0, 4, 2, 0, 2], [10, 10, 10, 12, 12, 12, 12, 10]]  # areas 8 and 4, turned
    assert coco._of_polygons(two, "") == pytest.approx(((2 * 8 + 11 * 4) / 12, (8 + 44) / 12))


def test_refuses_what_is_no_mask(images, tmp_path):
    folder = as_masks(tmp_path, ".png", binary=True, dtype=np.uint8)
    soft = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8), (3, 3), 1
    )
    Image.fromarray(soft).save(folder / "a.png")
    refused(folder, images, r"a.png holds \d+ values in \d+ pieces.*threshold soft edges")
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(folder / "a.png")
    refused(folder, images, r"a.png is RGB: it must have one channel")
    (folder / "a.png").write_bytes(b"no image")
    refused(folder, images, r"a.png is neither PNG nor TIFF")
    os.rename(folder / "b.png", folder / "c.png")
    refused(folder, images, r"c.png has no image c", FileNotFoundError)


def command(source: Path, images: Path, tmp_path: Path, *more: str) -> None:
    target = str(tmp_path / "scores")
    detect_score.main([str(source), "--images", str(images), "--target", target, *more])


def test_refuses_annotations_of_another_size(images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = as_voc(tmp_path)
    Image.fromarray(np.zeros((90, 101, 3), np.uint8)).save(images / "a.png")
    with pytest.raises(ValueError, match=r"a.png is 101 by 90 px and was annotated at 211 by 179"):
        command(source, images, tmp_path, "--mpp", "0.5")
    with pytest.raises(ValueError, match=r"a.png is 101 by 90 px and has 2 nuclei outside, one at"):
        command(as_csv(tmp_path), images, tmp_path, "--mpp", "0.5")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mpp", "0.5", "--radius-um", "0"), "--radius-um is 0.0: it must be above 0"),
        (("--mpp", "0.5", "--radius-um", "nan"), "--radius-um is nan"),
        (("--mpp", "-1"), "a.png is said to be -1 mpp"),
    ],
)
def test_refuses_scales_that_mean_nothing(more, message, images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        command(as_csv(tmp_path), images, tmp_path, *more)


def test_scores_real_liquid_cytology(shared_data, tmp_path, monkeypatch, caplog):
    """The published table and masks of 17 fields, at an estimated 0.8 mpp."""
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO")
    folder = shared_data / "lbc_nuclei_jks43"
    command(folder / "objects.csv", folder, tmp_path, "--mpp", "0.8", "--radius-um", "6.4")
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert (metrics["images"], metrics["annotated"]) == (17, 731)
    f1 = metrics["pooled"]["f1"]
    assert 0.8 < f1["low"] < f1["value"] < f1["high"] < 1
    assert "17 images, 731 nuclei" in caplog.text and "false_per_mm2" in caplog.text
    command(folder / "masks", folder / "images", tmp_path, "--mpp", "0.8", "--radius-um", "6.4")
    again = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert again["annotated"] == 743 and again["pooled"]["f1"]["value"] == pytest.approx(
        f1["value"], abs=0.02
    )
