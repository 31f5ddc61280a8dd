"""The report: everything on one page, nothing from outside, nothing of a slide's name trusted."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from stages import report
from stages.common import cohort, nuclei_figures, quality, stores, tally
from stages.common.cohort import SlideRow

HOSTILE = "<script>alert('x')&\""
CELLS = {
    ("pretrained", "abmil"): 0.9,
    ("pretrained", "meanpool"): 0.8,
    ("plain", "abmil"): 0.9,
    ("plain", "meanpool"): 0.7,
}
PATCHES = 11


def rows() -> list[SlideRow]:
    """Five slides of each class; the first test slide of class ill has a hostile name."""
    names = [(label, at) for label in ("well", "ill") for at in range(5)]
    return [
        SlideRow(
            HOSTILE if (label, at) == ("ill", 3) else f"{label}-{at}",
            "",
            label,
            f"p-{label}-{at}",
            "test" if at > 2 else "train",
            "0.5",
            "",
        )
        for label, at in names
    ]


def noise(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_slide(data: Path, row: SlideRow) -> None:
    noise(data / "tile" / row.slide_id / "thumbnail.jpg", 64, 47)
    noise(data / "detect" / row.slide_id / "overlay.jpg", 61, 61)
    noise(data / "perturb" / row.slide_id / "examples.jpg", 61, 61)
    patches = [np.full((16, 16, 3), 20 * at, np.uint8) for at in range(PATCHES)]
    attributes = {"slide_id": row.slide_id, "mpp": 0.5, "slide_mpp": 0.5, "input": "x"}
    origin = np.zeros((PATCHES, 2), np.int64)
    store = data / "tile" / row.slide_id / "patches.zarr"
    stores.create_patches(store, patches, origin, 16, attributes, "zstd")


def write_nuclei(data: Path, counts: dict[str, int]) -> None:
    """The tables of detect, as if so many nuclei had been found in each slide."""
    for slide_id, nuclei in counts.items():
        (data / "detect" / slide_id).mkdir(parents=True, exist_ok=True)
        radius = np.linspace(3, 5, nuclei)
        mine = tally.of(PATCHES, np.arange(nuclei) % PATCHES, radius)
        tally.write(data / "detect" / slide_id, mine)
    quality.write(data / "detect", list(counts))


def write_cell(data: Path, encoder: str, head: str, auc: float) -> None:
    folder = data / "evaluate" / encoder / head
    folder.mkdir(parents=True)
    figures = {name: {"mean": auc, "sd": 0.01} for name in report.FIGURES}
    figures["majority_accuracy"] = {"mean": 0.5, "sd": 0.0}
    slides = {"train": 6, "val": 2, "test": 4}
    (folder / "metrics.json").write_text(json.dumps({**figures, "slides": slides}))
    pd.DataFrame({"fpr": [0, 0.5, 1], "tpr": [0, auc, 1], "threshold": [1, 0.5, 0]}).to_csv(
        folder / "roc.csv", index=False
    )
    tests = [row for row in rows() if row.split == "test"]
    weights = np.arange(1, PATCHES + 1) if head == "abmil" else np.ones(PATCHES)
    attention = [
        {"slide_id": row.slide_id, "patch": at, "attention": weight / weights.sum()}
        for row in tests
        for at, weight in enumerate(weights)
    ]
    pd.DataFrame(attention).to_csv(folder / "attention.csv", index=False)
    predictions = [
        {"slide_id": row.slide_id, "split": "test", "seed": seed, "probability": 0.25 * seed}
        for row in tests
        for seed in (1, 2)
    ]
    pd.DataFrame(predictions).to_csv(folder / "predictions.csv", index=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as the stages before leave it, and params.yaml beside it."""
    root = tmp_path_factory.mktemp("made")
    data = root / "data"
    data.mkdir()
    (data / "cohort").mkdir()
    cohort.write_rows(data / "cohort", rows(), ["well", "ill"])
    for row in rows():
        write_slide(data, row)
    write_nuclei(data, {row.slide_id: 0 if row.slide_id == HOSTILE else 40 for row in rows()})
    noise(data / "pretrain" / "views.png", 1301, 31)
    for stage in report.COUNTED:
        (data / stage / "metrics.json").write_text(json.dumps({"slides": 10, "patches": 12345}))
    for (encoder, head), auc in CELLS.items():
        write_cell(data, encoder, head, auc)
    curves = data / "pretrain" / "dvclive" / "plots" / "metrics" / "train"
    curves.mkdir(parents=True)
    (curves / "loss.tsv").write_text("step\tloss\n0\t3.5\n1\t2.5\n2\t1.5\n")
    settings = {"seed": 7, "engine": {"workers": 93}, "tile": {"mpp": 0.5, "nested": {"deep": 31}}}
    encoders, heads = (list(dict.fromkeys(names)) for names in zip(*CELLS, strict=True))
    settings |= {"embed": {"encoders": encoders}, "evaluate": {"heads": heads}}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "root")


def page_of(root: Path) -> str:
    report.main(root / "data", root / "data" / "report", root / "params.yaml")
    return (root / "data" / "report" / "index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every tag with its attributes, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_hostile_slide_id_stays_text(root: Path) -> None:
    page = page_of(root)
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert any(HOSTILE in words for words in elements.words)
    assert any(HOSTILE in (attrs.get("alt") or "") for _, attrs in elements.tags)


def test_nothing_is_fetched(root: Path) -> None:
    elements = Elements(page_of(root))
    for tag, attrs in elements.tags:
        assert tag not in {"link", "iframe", "object", "embed", "script"}
        for name in ("src", "href", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))


def test_every_picture_has_an_alternative_text(root: Path) -> None:
    images = [attrs for tag, attrs in Elements(page_of(root)).tags if tag == "img"]
    # 3 thumbnails, 1 overlay and 1 example for each of 2 classes; 1 of views, 1 of a slide without
    # nuclei; attention: 2 classes x 2 encoders x (5 highest + 5 lowest of 11 patches)
    assert len(images) == 2 * 3 + 2 + 2 + 1 + 1 + 2 * 2 * 10
    assert all(attrs["alt"] for attrs in images)


def test_ids_are_unique_though_several_plots_stand_inline(root: Path) -> None:
    page = page_of(root)
    ids = [attrs["id"] for _, attrs in Elements(page).tags if "id" in attrs]
    assert page.count("<svg") == 5 and len(ids) == len(set(ids)) > 10
    references = re.findall(r'(?:href="#|url\(#)([\w-]+)', page)
    assert references and set(references) <= set(ids)


def test_the_best_of_each_column_is_bold_and_ties_share_it(root: Path) -> None:
    table = page_of(root).split("<tbody>")[1].split("</tbody>")[0]
    body = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    assert [re.findall(r'"name">(\w+)', line) for line in body] == [
        ["pretrained", "abmil"],
        ["pretrained", "meanpool"],
        ["plain", "abmil"],
        ["plain", "meanpool"],
    ]
    assert [line.count("<b>0.900</b> <span>± 0.010</span>") for line in body] == [3, 0, 3, 0]
    assert all("<td>0.500</td>" in re.sub(r"\s*(</?td>)\s*", r"\1", line) for line in body)


def test_attention_shows_the_highest_and_lowest_patches(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PATCHES", 4)
    data, cells = root / "data", report.read_cells(root / "data" / "evaluate", root / "params.yaml")
    tests = {"ill": [row for row in rows() if row.label == "ill"]}
    shown = report.attention_rows(data, cells, tests)
    assert [(item["encoder"], item["head"]) for item in shown] == [
        ("plain", "abmil"),
        ("pretrained", "abmil"),
    ]
    assert shown[0]["row"].slide_id == HOSTILE and shown[0]["probability"] == 0.375
    assert [item["patch"] for item in shown[0]["high"]] == [10, 9, 8, 7]
    assert [item["patch"] for item in shown[0]["low"]] == [3, 2, 1, 0]
    assert shown[0]["high"][0]["times"] == pytest.approx(11 / 6)  # 11 of 66, against 1 of 11


def test_few_patches_are_not_shown_twice(root: Path) -> None:
    cells = report.read_cells(root / "data" / "evaluate", root / "params.yaml")
    shown = report.attention_rows(root / "data", cells, {"ill": rows()[5:]})
    assert [len(shown[0][name]) for name in ("high", "low")] == [5, 5]


def test_settings_are_told_without_the_engine(root: Path) -> None:
    page = page_of(root)
    assert "<dt>nested.deep</dt><dd>31</dd>" in page and "<code>seed</code> 7" in page
    assert "workers" not in page


def test_large_counts_are_grouped(root: Path) -> None:
    assert "12\u202f345" in page_of(root)


def test_pictures_are_scaled_down(root: Path) -> None:
    assert len(page_of(root).encode()) < 400_000


def test_same_inputs_same_bytes(root: Path) -> None:
    assert page_of(root) == page_of(root)


def test_training_curves_may_be_absent(root: Path) -> None:
    shutil.rmtree(root / "data" / "pretrain" / "dvclive")
    page = page_of(root)
    assert "<h2>Training</h2>" not in page and page.count("<svg") == 4


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("cohort/cohort.csv", "cohort"),
        ("cohort/metrics.json", "cohort"),
        ("tile/metrics.json", "tile"),
        ("tile/ill-0/thumbnail.jpg", "tile"),
        ("detect/ill-0/overlay.jpg", "detect"),
        ("detect/slides.csv", "detect"),
        ("detect/radius.csv", "detect"),
        ("perturb/ill-0/examples.jpg", "perturb"),
        ("pretrain/views.png", "pretrain"),
        ("pretrain/metrics.json", "pretrain"),
        ("evaluate/plain/abmil/roc.csv", "evaluate"),
        ("evaluate/plain/abmil/attention.csv", "evaluate"),
    ],
)
def test_a_missing_input_names_its_stage(root: Path, path: str, stage: str) -> None:
    (root / "data" / path).unlink()
    with pytest.raises(FileNotFoundError, match=f"run `dvc repro {stage}`"):
        page_of(root)


def test_missing_evaluation_names_its_stage(root: Path) -> None:
    shutil.rmtree(root / "data" / "evaluate")
    with pytest.raises(FileNotFoundError, match="run `dvc repro evaluate`"):
        page_of(root)


def section_of(page: str) -> str:
    return page[page.index("<h2>Nuclei</h2>") : page.index("<h2>Perturbed views</h2>")]


def test_a_slide_that_stands_out_is_listed_with_its_reason_and_picture(root: Path) -> None:
    text = section_of(page_of(root))
    assert "1 of 10" in text and text.count("<svg") == 3
    elements = Elements(text)
    words = " ".join(" ".join(elements.words).split())
    assert f"{HOSTILE} no nuclei No nucleus was found in 11 patches" in words
    alternatives = [attrs["alt"] for tag, attrs in elements.tags if tag == "img"]
    assert f"Detected nuclei of slide {HOSTILE}, which has no nuclei" in alternatives
    assert all(attrs.get("aria-label") for _, attrs in elements.tags if attrs.get("role") == "img")


def test_a_cohort_in_which_nothing_stands_out_says_so(root: Path) -> None:
    write_nuclei(root / "data", {row.slide_id: 40 for row in rows()})
    text = section_of(page_of(root))
    assert "No slide stands out" in text and "<table" not in text


def test_no_nuclei_at_all_leave_a_page(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nuclei_figures, "FLAGGED_SHOWN", 3)
    write_nuclei(root / "data", {row.slide_id: 0 for row in rows()})
    text = section_of(page_of(root))
    assert "10 of 10" in text and text.count("which has no nuclei") == 3
    assert "7 more are listed in <code>data/detect/slides.csv</code>" in text


def test_a_thousand_slides_and_five_thousand_nuclei_in_a_patch_stay_small() -> None:
    slides = pd.DataFrame({"nuclei_per_patch": np.linspace(1, 5000, 1000)})
    slides["slide_id"], slides["flags"] = [str(at) for at in range(1000)], ""
    assert len(nuclei_figures.per_slide(slides)) < 75_000
    table = pd.DataFrame({"nuclei": np.arange(5001), "patches": 1})
    plot = nuclei_figures.per_patch(table)
    assert len(plot) < 30_000 and "4000" in plot


def test_slides_named_like_numbers_or_na_keep_their_names(tmp_path: Path) -> None:
    write_nuclei(tmp_path, {"007": 0, "NA": 0})
    for name in ("007", "NA"):
        noise(tmp_path / "detect" / name / "overlay.jpg", 61, 61)
    odd = nuclei_figures.section(tmp_path / "detect")["odd"]
    assert [row["slide_id"] for row in odd] == ["007", "NA"]


def test_results_of_another_configuration_stay_out(root):
    write_cell(root / "data", "stale-encoder", "abmil", 0.99)
    assert "stale-encoder" not in page_of(root)
