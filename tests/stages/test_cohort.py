import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import cohort as stage
from stages import index
from stages.common import cohort, failures, intake, outliers
from tests.common import pyramids


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """A repository whose twelve slides were opened before, so that tests need no worker."""
    home = tmp_path_factory.mktemp("known")
    with pytest.MonkeyPatch.context() as patch:
        enter(home, patch)
        for number in range(12):
            pixels = np.full((40, 50, 3), number * 20, np.uint8)
            Image.fromarray(pixels).save(f"slides/inner/s{number:02d}.png")
        stage.main()
    return home


@pytest.fixture(autouse=True)
def place(known, tmp_path, monkeypatch):
    """A repository with a folder of twelve small images of twelve patients; never written to."""
    enter(tmp_path, monkeypatch)
    for file in (known / "slides/inner").iterdir():
        os.link(file, Path("slides/inner") / file.name)
    shutil.copytree(known / "cache", "cache")


def enter(home: Path, monkeypatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("CYTOSSL_CACHE", str(home / "cache"))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path("slides/inner").mkdir(parents=True)
    write_params()
    write_labels(rows())


def replace(name: str, content: bytes) -> None:
    """Another file in the place of a slide."""
    file = Path("slides/inner") / name
    file.unlink()
    file.write_bytes(content)


def quarantine() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump({**values, "on_error": "quarantine"}))


ROOT = Path(__file__).resolve().parents[2]


def use_folder() -> None:
    """The demo's params, with the folder as source."""
    text = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("source: synthetic", "source: folder", 1))


def rows(**changes: str) -> list[dict[str, str]]:
    return [
        {
            "slide": f"inner/s{number:02d}.png",
            "label": "malignant" if number % 2 else "benign",
            "patient": f"p{number:02d}",
            "mpp": "0.25",
            **changes,
        }
        for number in range(12)
    ]


def write_labels(table: list[dict[str, str]]) -> None:
    with Path("slides/labels.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(table[0]) if table else ["slide", "label"])
        writer.writeheader()
        writer.writerows(table)


def write_params(**changes: object) -> None:
    section = {
        "source": "folder",
        "positive": "malignant",
        "test_share": 0.3,
        "val_share": 0.3,
        "folder": {"slides": "slides", "labels": "slides/labels.csv"},
        **changes,
    }
    engine = {"workers": 1, "scheduler": "tcp://no.use:1"}  # slides are opened on this machine
    values = {"seed": 1, "sparse_topk": 0, "irpe": "none", "cohort": section, "engine": engine}
    Path("params.yaml").write_text(yaml.safe_dump(values))


def test_lists_the_slides_with_digest_and_mpp():
    stage.main()
    found = cohort.read_rows()
    assert [row.slide_id for row in found] == [f"s{number:02d}" for number in range(12)]
    assert found[3].path == "slides/inner/s03.png" and found[3].mpp == "0.25"
    assert len({row.digest for row in found}) == 12
    assert cohort.read_classes() == ["benign", "malignant"]


def test_slides_that_did_not_change_are_not_opened_again_and_a_damaged_one_is(monkeypatch):
    asked, first = [], intake.dispatch.each

    def counted(workers, build, tasks, retries):
        asked.extend(tasks)
        return first(workers, build, tasks, retries)

    monkeypatch.setattr(intake.dispatch, "each", counted)
    stage.main()
    assert not asked
    replace("s03.png", Path("slides/inner/s03.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="slide s03.png is damaged"):
        stage.main()
    assert [row.slide_id for task in asked for row in task] == ["s03"]


def test_a_slide_that_crashes_its_reader_is_named_and_costs_no_other(tmp_path, monkeypatch):
    """A plug-in's C library ends its process: as a segmentation fault would."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    Path("sitecustomize.py").write_text(
        "import sys\n"
        "def deadly(event, found):\n"
        "    if event == 'open' and str(found[0]).endswith('s05.png'):\n"
        "        import os, signal\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "sys.addaudithook(deadly)\n"
    )
    for name in ("s05.png", "s06.png"):
        replace(name, Path(f"slides/inner/{name}").read_bytes())
    with pytest.raises(ValueError, match="has 1 problem:\n  s05: its worker process died"):
        stage.main()
    quarantine()
    stage.main()
    assert list(failures.read(Path("data/cohort"))) == ["s05"]
    assert "s06" in [row.slide_id for row in cohort.read_rows()]


def test_the_positive_class_is_the_last():
    write_params(positive="benign")
    stage.main()
    assert cohort.read_classes() == ["malignant", "benign"]


def test_splits_by_patient_and_alike_in_every_class():
    table = [
        {**row, "patient": f"p{number // 4}-{row['label']}"} for number, row in enumerate(rows())
    ]
    write_labels(table)
    stage.main()
    found = cohort.read_rows()
    by_patient = {row.patient: row.split for row in found}
    assert all(by_patient[row.patient] == row.split for row in found)
    counts = Counter((row.split, row.label) for row in found)
    assert counts == {(s, c): 2 for s in cohort.SPLITS for c in ("benign", "malignant")}


def test_same_seed_same_split_and_another_seed_another():
    def drawn(seed: int) -> list[str]:
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(re.sub(r"seed: \d+", f"seed: {seed}", text))
        stage.main()
        return [row.split for row in cohort.read_rows()]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_given_splits_are_kept_and_val_is_carved_out_of_train():
    table = [
        {**row, "split": "test" if number < 4 else "train"} for number, row in enumerate(rows())
    ]
    write_labels(table)
    stage.main()
    found = cohort.read_rows()
    assert [row.split == "test" for row in found] == [True] * 4 + [False] * 8
    assert {row.split for row in found[4:]} == {"train", "val"}


def with_first(**changes: str) -> list[dict[str, str]]:
    table = rows()
    table[0] = {**table[0], **changes}
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "labels.csv names no slides"),
        (with_first(slide="inner/none.png"), "slide none has no file slides/inner/none.png: copy"),
        (with_first(slide="../secret.png"), "line 2: slide ../secret.png lies outside"),
        (with_first(slide="/etc/passwd"), "line 2: slide /etc/passwd lies outside"),
        (with_first(slide=""), "line 2: column slide is empty"),
        (with_first(label=""), "line 2: slide inner/s00.png has no label"),
        (with_first(mpp="fine"), "has mpp 'fine': it must be a number"),
        (with_first(mpp=""), "s00.png has no mpp in its metadata: give it in the labels file"),
        (with_first(mpp="-1"), "s00.png is said to be -1 mpp"),
        (with_first(slide="inner/s01.png"), "slide id s01 (slides/inner/s01.png) occurs twice"),
        (rows(label="benign"), "all slides have the label 'benign'"),
        ([{"slide": "inner/s00.png"}], "labels.csv has no column label: it has slide"),
        (rows(split="dev"), "has split 'dev': choose of train, val, test"),
        (
            [{**row, "split": ["train", "test"][n % 2]} for n, row in enumerate(rows(patient="p"))],
            "patient p is in the splits test, train: put them in one",
        ),
        (
            [{**row, "split": "test" if n == 3 else ""} for n, row in enumerate(rows())],
            "patient p00 has no split and others have",
        ),
        (rows()[:4], "split train has no slide of class benign"),
        ([{**row, "slide_id": f"../{n}"} for n, row in enumerate(rows())], "cannot name a folder"),
        ([{**row, "slide_id": "a/b"} for row in rows()[:1]], "cannot name a folder"),
        ([{**row, "slide_id": "."} for row in rows()[:1]], "cannot name a folder"),
        (with_first(slide_id="metrics.json"), "'metrics.json' cannot name a folder"),
        (
            with_first(slide_id="failed.csv"),
            "'failed.csv' cannot name a folder: Windows",
        ),
        (with_first(slide_id="細" * 60), "longer than 120 bytes"),
        (with_first(slide_id="con"), "give another in a column slide_id"),
        (with_first(slide_id="S01"), "slide id S01 (slides/inner/s00.png) occurs twice"),
        (rows(Patient="p"), "has a column Patient: call it patient, or rename it"),
    ],
)
def test_refuses_a_bad_table_and_writes_nothing(table, message):
    write_labels(table)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        stage.main()
    assert not Path("data/cohort/cohort.csv").exists()


def test_three_labels_are_three_classes_and_none_is_the_positive_one():
    names = ("other", "benign", "malignant")
    write_labels([{**row, "label": names[at % 3]} for at, row in enumerate(rows())])
    with pytest.raises(
        ValueError, match=r"slides have 3 labels \(benign, malignant, other\): leave it"
    ):
        stage.main()
    write_params(positive="")
    stage.main()
    assert cohort.read_classes() == ["benign", "malignant", "other"]


def test_every_problem_is_told_at_once():
    table = rows()
    table[0]["slide"], table[1]["label"] = "../none.png", ""
    write_labels(table)
    with pytest.raises(ValueError, match="has 2 problems:\n  line 2: .*\n  line 3: "):
        stage.main()
    write_labels(rows())
    for name in ("s03", "s07"):
        replace(f"{name}.png", b"")
    with pytest.raises(ValueError, match="has 2 problems:\n  s03: slide s03.*\n  s07: slide s07"):
        stage.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "clinic"}, "no 'clinic' in stages/sources: choose one of fnac2019, folder"),
        ({"positive": "cancer"}, "cohort.positive is 'cancer': set it to one of benign, malignant"),
        ({"test_share": 1.0}, "cohort.test_share is 1.0: it must be above 0 and below 1"),
        ({"folder": {"slides": "none", "labels": "l.csv"}}, "no folder none"),
        ({"folder": {"slides": "slides", "labels": "none.csv"}}, "no labels file"),
    ],
)
def test_refuses_bad_params(changes, message):
    write_params(**changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage.main()


def test_refuses_the_same_content_under_two_names():
    replace("s03.png", Path("slides/inner/s00.png").read_bytes())
    with pytest.raises(ValueError, match=r"slides s00 \(s00.png\) and s03 \(s03.png\) have"):
        stage.main()


def test_of_one_content_with_two_labels_neither_is_kept():
    replace("s03.png", Path("slides/inner/s00.png").read_bytes())
    quarantine()
    stage.main()
    failed = failures.read(Path("data/cohort"))
    assert list(failed) == ["s00", "s03"]
    assert all("their labels differ (benign and malignant)" in why for why in failed.values())


def test_an_mpp_that_contradicts_the_slides_own_is_told_and_taken(caplog):
    pyramids.write(Path("slides/inner/s01.svs"))  # says 0.25 of itself
    for mpp, told in (("0.25", False), ("0.5", True)):
        caplog.clear()
        table = rows()
        table[1] |= {"slide": "inner/s01.svs", "mpp": mpp}
        write_labels(table)
        stage.main()
        (row,) = [row for row in cohort.read_rows(Path("data/cohort")) if row.slide_id == "s01"]
        assert row.mpp == mpp
        assert ("s01 says of itself that it has an mpp of 0.25, and 0.5" in caplog.text) == told


def test_files_that_are_no_use_are_quarantined_where_that_is_wanted():
    """Cut short, gone with its folder, and a copy under another name; their classes stay two."""
    replace("s02.png", Path("slides/inner/s02.png").read_bytes()[:60])
    replace("s06.png", Path("slides/inner/s04.png").read_bytes())
    with pytest.raises(ValueError, match=r"the cohort has 2 problems:(?s:.*)s02\.png is damaged"):
        stage.main()
    quarantine()
    stage.main()
    assert [row.slide_id for row in cohort.read_rows(Path("data/cohort"))] == [
        f"s{number:02d}" for number in range(12) if number not in (2, 6)
    ]
    failed = failures.read(Path("data/cohort"))
    assert list(failed) == ["s02", "s06"] and "same content" in failed["s06"]
    metrics = json.loads(Path("data/cohort/metrics.json").read_text())
    assert (metrics["slides"], metrics["failed"]) == (10, 2)


def test_quarantine_with_no_slide_left_says_why():
    quarantine()
    for number in range(12):
        replace(f"s{number:02d}.png", b"")
    with pytest.raises(ValueError, match="all 12 slides of the cohort failed(?s:.*)  s11: .*0 byt"):
        stage.main()


def test_a_slide_that_is_away_is_quarantined_and_taken_in_when_it_is_back(caplog):
    away = Path("slides/inner/s03.png").rename("s03.png")
    with pytest.raises(ValueError, match=r"1 problem:\n  slide s03 has no file slides/inner/s03"):
        stage.main()
    quarantine()
    stage.main()
    assert list(failures.read(Path("data/cohort"))) == ["s03"]
    away.rename("slides/inner/s03.png")
    stage.main()
    assert failures.read(Path("data/cohort")) == {}
    assert [row.slide_id for row in cohort.read_rows()] == [f"s{n:02d}" for n in range(12)]


def test_slides_looked_at_anew_keep_their_places():
    replace("s03.png", Path("slides/inner/s03.png").read_bytes())
    stage.main()
    assert [row.slide_id for row in cohort.read_rows()] == [f"s{n:02d}" for n in range(12)]


def test_a_slide_that_vanishes_midway_is_no_bad_slide(monkeypatch):
    quarantine()
    replace("s03.png", Path("slides/inner/s03.png").read_bytes())
    first = intake.dispatch.each

    def late(*given):
        Path("slides/inner/s03.png").unlink()
        return first(*given)

    monkeypatch.setattr(intake.dispatch, "each", late)
    with pytest.raises(FileNotFoundError, match="1 slides vanished, s03 for one: run again"):
        stage.main()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"slide;label\na;b\n", "has no column slide: it has slide;label; separate columns by"),
        (b"slide,label,label\na,b,c\n", "has the column label twice"),
        (b"slide,label\na,b,c\n", "line 2 has more fields than columns"),
        (b"slide,label\ninner/s\xe900.png,b\n", "labels.csv is not UTF-8 text"),
        (b"slide,label\n\n\nnone.png,\n", "line 4: slide none.png has no label"),
        (b"slide,label\n" + b"a" * 200_000 + b",b\n", "labels.csv is no CSV"),
    ],
)
def test_refuses_what_is_not_the_csv_it_should_be(content, message):
    Path("slides/labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        stage.main()


def test_a_byte_order_mark_and_windows_line_ends_are_read():
    text = Path("slides/labels.csv").read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    Path("slides/labels.csv").write_bytes(b"\xef\xbb\xbf" + text)
    stage.main()
    assert len(cohort.read_rows()) == 12


def test_names_with_spaces_and_accents_work():
    Path("slides/inner/s00.png").rename("slides/inner/Lamina nº 3 (b).png")
    write_labels(with_first(slide="inner/Lamina nº 3 (b).png"))
    stage.main()
    assert "Lamina nº 3 (b)" in [row.slide_id for row in cohort.read_rows()]


@pytest.mark.parametrize(
    ("param", "value", "message"),
    [
        ("detect.detector", "eye", "no 'eye' in stages/detectors: choose one of cellpose"),
        ("pretrain.method", "dyno", "no 'dyno' in stages/methods: choose one of byol, dino"),
        ("evaluate.heads", ["abmil", "hydra"], "no 'hydra' in stages/heads"),
        ("evaluate.heads", [], "evaluate.heads is []: name one or more"),
        ("embed.encoders", ["resnet"], "embed.encoders names 'resnet': choose of pretrained"),
        ("sparse_topk", -1, "sparse_topk is -1: it must be 1 or more, or 0"),
        ("seed", 10**23, "it must be from 0 to"),
    ],
)
def test_the_index_finds_wrong_names_before_any_work(param, value, message):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    *sections, key = param.split(".")
    inner = values
    for name in sections:
        inner = inner[name]
    inner[key] = value
    Path("params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        index.main()


def test_the_index_survives_stray_links_and_a_slide_folder_that_is_away():
    use_folder()
    Path("slides/.#lock").symlink_to("nowhere")
    Path("slides/loop").symlink_to(Path("slides").absolute())
    index.main()
    before = Path("data/index/slides.csv").read_text()
    assert before.count("s00.png") == 1
    Path("slides").rename("away")
    index.main()
    assert Path("data/index/slides.csv").read_text() == before


CLOSED = """
import os, sys
from pathlib import Path
from stages import cohort, index
from stages.sources import folder
os.umask(0)
"".encode("utf-8-sig")
index.main()  # as root, who may import what it needs
closed = Path(sys.argv[1])
closed.chmod(0o600)
os.setuid(65534)
index.main()
if closed.is_dir():  # a file is opened by processes, which this user may not start
    try:
        cohort.main()
    except (ValueError, OSError) as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("closed", ["slides/inner/s03.png", "slides/inner", "slides"])
def test_what_may_not_be_read_is_named_and_told_by_the_index(known, closed):
    """As another user, in a process of its own: root may read everything."""
    use_folder()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "home"
        shutil.copytree(".", home)
        for path in (place, *(str(path) for path in home.rglob("*")), home):
            os.chmod(path, 0o777)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CYTOSSL_CACHE": str(home / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", CLOSED, closed],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
        )
        listed = (home / "data/index/slides.csv").read_text().splitlines()
    assert done.returncode == 0, done.stderr
    if not closed.endswith(".png"):
        assert f"{closed} may not be read by this user: change its permissions" in done.stdout
    assert [line.rsplit(",", 1)[1] for line in listed[1:]].count("0") == 1


def test_the_index_sees_a_replaced_slide_and_is_empty_without_a_folder():
    use_folder()
    index.main()
    before = Path("data/index/slides.csv").read_text()
    index.main()
    assert Path("data/index/slides.csv").read_text() == before
    Path("slides/inner/s00.png").unlink()
    Image.new("RGB", (50, 40), "red").save("slides/inner/s00.png")
    index.main()
    assert Path("data/index/slides.csv").read_text() != before
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    index.main()
    assert Path("data/index/slides.csv").read_text() == "path,bytes,mtime_ns,readable\n"


def test_tells_of_a_slide_whose_mpp_is_far_from_the_others(caplog):
    table = rows()
    table[3]["mpp"], table[4]["mpp"] = "0.5", "0.26"
    write_labels(table)

    with caplog.at_level("WARNING"):
        stage.main()

    told = [record.getMessage() for record in caplog.records]
    assert [("s03" in text, "0.5" in text, "0.25 is usual" in text) for text in told] == [
        (True, True, True)
    ]
    assert json.loads(Path("data/cohort/metrics.json").read_text())["mpp_outliers"] == 1
    listed = [{"slide_id": "s03", "mpp": "0.5", "usual": "0.25"}]
    assert outliers.read(Path("data/cohort")) == listed


def test_counts_no_mpp_outlier_where_all_slides_agree():
    stage.main()

    assert json.loads(Path("data/cohort/metrics.json").read_text())["mpp_outliers"] == 0
