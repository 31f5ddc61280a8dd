"""The report: everything on one page, nothing from outside, nothing of a slide's name trusted."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from markupsafe import escape
from PIL import Image

from stages import report
from stages.common import (
    cell_figures,
    cohort,
    coverage,
    curves,
    failures,
    nuclei_figures,
    quality,
    stores,
    table1,
    tally,
    tile_figures,
)
from stages.common.cohort import SlideRow
from stages.common.coverage import Coverage

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


def write_coverage(data: Path, patches: dict[str, int], blurred: int = 0) -> None:
    """The tables of tile, as if so many of 11 patches had been found in each slide."""
    for slide_id, count in patches.items():
        blur = {"positions": {2: 30, 15: blurred}, "patches": {2: count}}
        empty = {"positions": {4: 20, 9: 30}, "patches": {4: count}}
        one = Coverage(50, max(count, 5), blurred, 99, PATCHES, count, blur, empty)
        (data / "tile" / slide_id).mkdir(parents=True, exist_ok=True)
        coverage.write(data / "tile" / slide_id, one)
    coverage.write_tables(data / "tile", list(patches))


def write_nuclei(data: Path, counts: dict[str, int]) -> None:
    """The tables of detect, as if so many nuclei had been found in each slide."""
    for slide_id, nuclei in counts.items():
        (data / "detect" / slide_id).mkdir(parents=True, exist_ok=True)
        radius = np.linspace(3, 5, nuclei)
        mine = tally.of(PATCHES, np.arange(nuclei) % PATCHES, radius)
        tally.write(data / "detect" / slide_id, mine)
    quality.write(data / "detect", list(counts))


def figures_of(auc: float) -> dict[str, float]:
    """The figures of a cell that the page shows."""
    figures = {name: auc for name in (*table1.TITLES, *cell_figures.MORE)}
    ends = {"auc": "delong", "accuracy": "wilson", "recall": "wilson", "specificity": "wilson"}
    for name, method in ends.items():
        figures |= {f"{name}_{method}_low": auc - 0.1, f"{name}_{method}_high": auc + 0.05}
    figures |= {"auc_seed_sd": 0.0123, "ece": 0.2, "ece_scaled": 0.1, "majority_accuracy": 0.5}
    counts = {"slides_test": 4, "patients_test": 4, "splits": 1, "seeds": 2}
    return figures | counts | {"sanity_permuted_labels_auc": 0.4321}


def write_cell(data: Path, encoder: str, head: str, auc: float) -> None:
    folder = data / "evaluate" / encoder / head
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(figures_of(auc)))
    half = pd.DataFrame({"fpr": [0, 0.5, 1], "tpr": [0, auc, 1], "threshold": [1, 0.5, 0]})
    half.to_csv(folder / "roc.csv", index=False)
    pr = pd.DataFrame({"recall": [0, 1], "precision": [auc, auc]})
    pr.to_csv(folder / "pr.csv", index=False)
    bins = {"scaling": ["before", "before", "after"], "slides": 2, "predicted": [0.1, 0.8, 0.6]}
    pd.DataFrame(bins | {"observed": [0.2, 0.9, 0.5]}).to_csv(
        folder / "calibration.csv", index=False
    )
    tests = [row for row in rows() if row.split == "test"]
    weights = np.arange(1, PATCHES + 1) if head == "abmil" else np.ones(PATCHES)
    # In a later repeat the head looks the other way: the page shows the first.
    attention = [
        {"slide_id": row.slide_id, "repeat": repeat, "fold": 0, "patch": at, "attention": weight}
        for repeat, way in ((0, 1), (1, -1))
        for row in tests
        for at, weight in enumerate(weights[::way] / weights.sum())
    ]
    pd.DataFrame(attention).to_parquet(folder / "attention.parquet", index=False)
    predictions = [
        {"slide_id": row.slide_id, "split": split, "seed": seed, "probability_0": 1 - chance}
        | {"probability_1": chance}
        for row in tests
        for split, seed, chance in (("test", 1, 0.25), ("test", 2, 0.5), ("val", 1, 1.0))
    ]
    pd.DataFrame(predictions).to_parquet(folder / "predictions.parquet", index=False)


def write_comparisons(data: Path, heads: tuple[str, ...] = ("abmil", "meanpool")) -> None:
    """Table 1 of the cells, and the first encoder against the other."""
    folder = data / "compare"
    folder.mkdir(exist_ok=True)
    order = sorted(CELLS, key=lambda cell: heads.index(cell[1]))
    table = table1.rows_of({cell: figures_of(CELLS[cell]) for cell in order})
    table.to_csv(folder / "table1.csv", index=False)
    (folder / "table1.md").write_text(table1.markdown(table, "Table 1. The caption."))
    row = {"encoder": "pretrained", "other": "plain", "test": "delong"}
    row |= {"auc_difference": 0.0625, "auc_difference_low": -0.125, "auc_difference_high": 0.25}
    row |= {"only_encoder_right": 7, "only_other_right": 3, "p_holm": 0.0004}
    row |= {"p_mcnemar_holm": 0.3438}
    found = pd.DataFrame([{"head": head} | row for head in heads])
    found.loc[1, "p_holm"] = np.nan
    found.to_csv(folder / "comparisons.csv", index=False)


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
    write_coverage(data, {row.slide_id: PATCHES for row in rows()})
    write_nuclei(data, {row.slide_id: 0 if row.slide_id == HOSTILE else 40 for row in rows()})
    noise(data / "pretrain" / "views.png", 1301, 31)
    for stage in report.COUNTED:
        (data / stage / "metrics.json").write_text(json.dumps({"slides": 10, "patches": 12345}))
    for (encoder, head), auc in CELLS.items():
        write_cell(data, encoder, head, auc)
    write_comparisons(data)
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


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    """The page of the folder as it was made; `root` is for what spoils it."""
    return page_of(made)


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


def test_a_hostile_slide_id_stays_text(page: str) -> None:
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert any(HOSTILE in words for words in elements.words)
    assert any(HOSTILE in (attrs.get("alt") or "") for _, attrs in elements.tags)


def test_nothing_is_fetched(page: str) -> None:
    elements = Elements(page)
    for tag, attrs in elements.tags:
        assert tag not in {"link", "iframe", "object", "embed", "script"}
        for name in ("src", "href", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))


def test_every_picture_has_an_alternative_text(page: str) -> None:
    images = [attrs for tag, attrs in Elements(page).tags if tag == "img"]
    # 3 thumbnails, 1 overlay and 1 example for each of 2 classes; 1 of views, 1 of a slide without
    # nuclei; 4 thumbnails of others; attention: 2 classes x 2 encoders x (5 highest + 5 lowest of
    # 11 patches)
    assert len(images) == 2 * 3 + 2 + 2 + 4 + 1 + 1 + 2 * 2 * 10
    assert all(attrs["alt"] for attrs in images)


def test_ids_are_unique_though_several_plots_stand_inline(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Elements(page).tags if "id" in attrs]
    assert page.count("<svg") == 4 + 2 * 3 + 2 + 2 * 10 and len(ids) == len(set(ids)) > 10
    references = re.findall(r'(?:href="#|url\(#)([\w-]+)', page)
    assert references and set(references) <= set(ids)


def body_of(page: str, name: str) -> list[list[str]]:
    """The cells of a table's rows, each as its text with marks."""
    table = page.split(f'<table class="{name}">')[1].split("<tbody>")[1].split("</tbody>")[0]
    found = re.findall(r"<tr.*?>(.*?)</tr>", table, flags=re.DOTALL)
    cells = [re.findall(r"<td.*?>(.*?)</td>", line, flags=re.DOTALL) for line in found]
    return [
        [cell.replace("<span>", "").replace("</span>", "").strip() for cell in row] for row in cells
    ]


def test_the_best_of_each_head_is_bold_and_ties_share_it(page: str) -> None:
    body = body_of(page, "table1")
    assert [row[:2] for row in body] == [
        ["abmil", "pretrained"],
        ["abmil", "plain"],
        ["abmil", "(permuted labels)"],
        ["meanpool", "pretrained"],
        ["meanpool", "plain"],
        ["meanpool", "(permuted labels)"],
    ]
    assert [row[2] for row in body] == [
        "<b>0.900</b> [0.800, 0.950]",
        "<b>0.900</b> [0.800, 0.950]",
        "0.432",
        "<b>0.800</b> [0.700, 0.850]",
        "0.700 [0.600, 0.750]",
        "0.432",
    ]
    assert page.count('<tr class="dull">') == 2 and "<p>Table 1. The caption.</p>" in page


def test_comparisons_tell_the_effect_its_interval_and_p(page: str) -> None:
    assert body_of(page, "comparisons") == [
        ["abmil", "pretrained", "plain", "+0.062 [-0.125, +0.250]", "&lt; 0.001", "7 : 3", "0.344"],
        ["meanpool", "pretrained", "plain", "+0.062 [-0.125, +0.250]", "unknown", "7 : 3", "0.344"],
    ]
    assert "are of DeLong&#39;s test, and p is Holm's, for all 2 comparisons" in page


def test_one_encoder_leaves_no_comparison(root: Path) -> None:
    (root / "data" / "compare" / "comparisons.csv").write_text("head,encoder,other,test\n")
    assert "Between encoders" not in page_of(root)


def test_spread_and_calibration_stand_in_a_table_of_their_own(page: str) -> None:
    titles = page.split('<table class="more">')[1].split("</thead>")[0]
    found = re.findall(r"<th>(.*?)</th>", titles)
    row = dict(zip(found, body_of(page, "more")[3][2:], strict=True))
    assert (row["AUC, SD of seeds"], row["ECE"], row["ECE, scaled"]) == ("0.012", "0.200", "0.100")
    assert row["AUC of the seed ensemble"] == "0.700" and row["Majority class"] == "0.500"


def test_optimistic_figures_are_called_so(root: Path) -> None:
    for cell in (root / "data" / "evaluate").glob("*/*/metrics.json"):
        figures = json.loads(cell.read_text())
        cell.write_text(json.dumps({f"optimistic_{name}": figures[name] for name in figures}))
    page = page_of(root)
    titles = page.split('<table class="more">')[1].split("</thead>")[0]
    assert page.count("(optimistic)</h3>") == 2 + 2  # comparisons, spread, two heads
    assert titles.count("(optimistic)</th>") == titles.count("<th>") == len(cell_figures.MORE)


def test_curves_of_many_folds_are_thinned_to_their_ends() -> None:
    table = pd.DataFrame({"fpr": np.linspace(0, 1, 4001), "tpr": np.linspace(0, 1, 4001)})
    thin = curves.thinned(table)
    assert len(thin) == curves.POINTS and thin.fpr.iloc[[0, -1]].tolist() == [0, 1]
    assert len(curves.thinned(table[:90])) == 90


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


def test_settings_are_told_without_the_engine(page: str) -> None:
    assert "<dt>nested.deep</dt><dd>31</dd>" in page and "<code>seed</code> 7" in page
    assert "workers" not in page


def test_large_counts_are_grouped(page: str) -> None:
    assert "12\u202f345" in page


def test_pictures_are_scaled_down(page: str) -> None:
    assert len(page.encode()) < 400_000


def test_same_inputs_same_bytes(root: Path) -> None:
    assert page_of(root) == page_of(root)


def test_training_curves_may_be_absent(root: Path) -> None:
    shutil.rmtree(root / "data" / "pretrain" / "dvclive")
    page = page_of(root)
    assert "<h2>Training</h2>" not in page and page.count("<svg") == 3 + 2 * 3 + 2 + 2 * 10


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("cohort/cohort.csv", "cohort"),
        ("cohort/metrics.json", "cohort"),
        ("tile/metrics.json", "tile"),
        ("tile/ill-0/thumbnail.jpg", "tile"),
        ("tile/ill-0/coverage.json", "tile"),
        ("tile/slides.csv", "tile"),
        ("tile/histograms.csv", "tile"),
        ("detect/ill-0/overlay.jpg", "detect"),
        ("detect/slides.csv", "detect"),
        ("detect/radius.csv", "detect"),
        ("perturb/ill-0/examples.jpg", "perturb"),
        ("pretrain/views.png", "pretrain"),
        ("pretrain/metrics.json", "pretrain"),
        ("evaluate/plain/abmil/roc.csv", "evaluate"),
        ("evaluate/plain/abmil/pr.csv", "evaluate"),
        ("evaluate/plain/abmil/predictions.parquet", "evaluate"),
        ("evaluate/plain/abmil/attention.parquet", "evaluate"),
        ("compare/table1.csv", "compare"),
        ("compare/comparisons.csv", "compare"),
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


def tiles_of(page: str) -> str:
    return page[page.index("<h2>Slides and patches</h2>") : page.index("<h2>Nuclei</h2>")]


def test_slides_with_few_patches_or_out_of_focus_come_first(root: Path) -> None:
    few = {row.slide_id: 3 if row.slide_id == HOSTILE else PATCHES for row in rows()}
    write_coverage(root / "data", few)
    text = tiles_of(page_of(root))
    assert "1 of 10" in text and text.index("stand out") < text.index("All slides")
    elements = Elements(text)
    words = " ".join(" ".join(elements.words).split())
    assert f"{HOSTILE} few patches 3 patches of the 11 asked for: 5 of 50 positions" in words
    alternatives = [attrs["alt"] for tag, attrs in elements.tags if tag == "img"]
    assert alternatives[0] == f"Thumbnail of slide {HOSTILE}: few patches"
    assert "script" not in {tag for tag, _ in elements.tags}
    # Two of the cohort; two of each slide.
    assert text.count("<svg") == 2 + 2 * 10


def test_a_cohort_of_blurred_slides_stays_a_page(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_figures, "FLAGGED_SHOWN", 4)
    write_coverage(root / "data", {row.slide_id: PATCHES for row in rows()}, blurred=30)
    text = tiles_of(page_of(root))
    assert (
        "10 of 10" in text
        and len(re.findall('alt="Thumbnail of slide [^:]*: out of focus"', text)) == 4
    )
    assert "6 more are listed in <code>data/tile/slides.csv</code>" in text


def test_a_cohort_without_odd_slides_says_so(page: str) -> None:
    assert "No slide is nearly blank" in tiles_of(page)


def test_every_slide_is_in_the_table_and_all_of_a_small_cohort_are_pictured(root: Path) -> None:
    write_coverage(
        root / "data", {row.slide_id: 3 if "-4" in row.slide_id else 11 for row in rows()}
    )
    text = tiles_of(page_of(root))
    body = body_of(text, "each")
    assert [row[0] for row in body] == [str(escape(row.slide_id)) for row in rows()]
    assert body[4][1:] == ["50", "5", "0", "99", "3", "few patches"] and body[0][6] == ""
    pictured = re.findall('alt="Thumbnail of slide ([^,:]*?)[,:"]', text)
    assert sorted(pictured) == sorted(row[0] for row in body)
    assert "Pictured are" not in text


def test_a_thousand_slides_stay_a_page(root: Path) -> None:
    names = [row.slide_id for row in rows()] + [f"more-{at}" for at in range(990)]
    write_coverage(root / "data", {name: 3 if name.endswith("7") else PATCHES for name in names})
    noise(root / "wide.jpg", 1024, 700)
    for name in names:
        (root / "data" / "tile" / name / "thumbnail.jpg").unlink(missing_ok=True)
        os.link(root / "wide.jpg", root / "data" / "tile" / name / "thumbnail.jpg")
    page = page_of(root)
    text = tiles_of(page)
    assert len(body_of(text, "each")) == 1000 and len(page) < 10e6
    shown = 6 + tile_figures.FLAGGED_SHOWN + tile_figures.OTHERS_SHOWN
    assert len(re.findall("<img", text)) == shown
    assert "Pictured are 90 of 1\u202f000 slides" in text


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


def test_slides_that_failed_stand_at_the_top_and_are_not_looked_for(root):
    data = root / "data"
    assert "were left out" not in page_of(root)
    failures.write(data / "detect", {"ill-0": "its worker process died"})
    failures.write(data / "split", {"well-0": "tile: <b>damaged</b>", "ill-1": "embed plain: gone"})
    for place in (
        "detect/ill-0",
        "perturb/ill-0",
        "tile/well-0",
        "detect/well-0",
        "perturb/well-0",
    ):
        shutil.rmtree(data / place)
    write_coverage(data, {row.slide_id: PATCHES for row in rows() if row.slide_id != "well-0"})
    page = page_of(root)
    top = page[: page.index('<ol class="chain">')]
    assert "3 of 10 slides failed and were left out." in top
    for slide_id, why in {
        "well-0": "Not trained on or evaluated. tile: &lt;b&gt;damaged&lt;/b&gt;",
        "ill-0": "Not trained on. detect: its worker process died",
        "ill-1": "Not evaluated. embed plain: gone",
    }.items():
        assert f"<dt>{slide_id}</dt><dd>{why}</dd>" in top
    assert "Thumbnail of slide ill-2" in page and "Thumbnail of slide ill-0, class" not in page
