"""The pipeline as a user runs it: real DVC on a small cohort, from nothing to the report."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "cohort.synthetic.slides": 12,
    "cohort.synthetic.width_px": 1024,
    "cohort.synthetic.height_px": 1024,
    "tile.patches_per_slide": 6,
    "pretrain.epochs": 2,
    "pretrain.warmup_epochs": 0.5,
    "pretrain.global_px": 32,
    "pretrain.dino.local_px": 16,
    "pretrain.dino.local_views": 1,
    "pretrain.dino.prototypes": 32,
    "pretrain.dino.hidden_dim": 32,
    "evaluate.seeds": 2,
    "evaluate.abmil.training.epochs": 3,
}
PER_SLIDE = ("tile", "detect", "perturb")
AFTER_PRETRAIN = {"embed", "split", "evaluate", "compare", "report"}


def copy_tree(folder: Path) -> None:
    """The working tree's files, as a clone of the next commit would have them."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def set_params(folder: Path, changes: dict[str, object]) -> None:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    for place, value in changes.items():
        *sections, key = place.split(".")
        section = values
        for name in sections:
            section = section[name]
        assert key in section, f"params.yaml has no {place}"
        section[key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


class Repository:
    """A copy of this repository with tiny params, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = Path(sys.executable).parent
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        dropped = ("DVC_ROOT", "CYTOSSL_CACHE", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        identity = {
            f"GIT_{who}_{what}": "tester"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        self.environment = {**kept, **identity, "PATH": path}

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert bool(done.returncode) == fails, f"{' '.join(command)}:\n{done.stdout}"
        return done.stdout

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "step")


def stages_run(output: str) -> set[str]:
    """The stages that DVC ran, without the matrix cells and the index, which always runs."""
    found = re.findall(r"Running stage '(\w+)", output)
    return set(found) - {"index"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, str]:
    """The repository after its first `dvc repro`, and what that printed."""
    repository = Repository(tmp_path_factory.mktemp("repository"))
    copy_tree(repository.folder)
    set_params(repository.folder, TINY)
    repository.run("git", "init", "-q")
    repository.commit()
    output = repository.run("dvc", "repro")
    repository.commit()
    return repository, output


def test_the_chain_leads_from_slides_to_the_report(chain):
    repository, output = chain
    assert stages_run(output) == {
        "cohort", "tile", "detect", "perturb", "pretrain", "embed", "split", "evaluate", "compare",
        "report",
    }  # fmt: skip
    page = (repository.folder / "data/report/index.html").read_text()
    assert "pretrained" in page and "untrained" in page
    for encoder in ("pretrained", "untrained"):
        for head in ("abmil", "meanpool"):
            folder = repository.folder / "data/evaluate" / encoder / head
            metrics = json.loads((folder / "metrics.json").read_text())
            assert 0 <= metrics["auc"] <= 1 and 0 <= metrics["sanity_random_features_auc"] <= 1
    assert "| abmil | pretrained |" in (repository.folder / "data/compare/table1.md").read_text()


def test_git_sees_no_data(chain):
    repository, _ = chain
    assert "data/" not in repository.run("git", "ls-files")


def test_nothing_changed_nothing_reruns(chain):
    repository, _ = chain
    assert stages_run(repository.run("dvc", "repro")) == set()


def test_metrics_experiments_and_plots_read_well(chain):
    repository, _ = chain
    shown = repository.run("dvc", "metrics", "show")
    assert "balanced_accuracy" in shown and "data/tile/metrics.json" in shown
    repository.run("dvc", "exp", "show", "--csv")
    plots = json.loads(repository.run("dvc", "plots", "show", "--json"))
    assert len(plots["data"]) > 8 and not plots.get("errors")
    assert "data/compare/cells/abmil-pretrained.json" in shown


def test_another_topk_reruns_pretrain_and_what_follows(chain):
    repository, _ = chain
    output = repository.run("dvc", "exp", "run", "-S", "sparse_topk=3")
    assert stages_run(output) == {"pretrain", *AFTER_PRETRAIN}
    assert "abmil_pretrained_auc" in repository.run("dvc", "metrics", "diff", "--all")
    repository.run("git", "checkout", "-q", ".")
    repository.run("dvc", "checkout")


def test_temporary_runs_share_the_cache_and_perturb_can_be_switched_off(chain):
    repository, _ = chain
    output = repository.run("dvc", "exp", "run", "--temp", "-S", "perturb.enabled=false")
    assert stages_run(output) == {"perturb", "pretrain", *AFTER_PRETRAIN}
    assert "perturb: 12 slides to make, 0 reused" in output
    again = repository.run(
        "dvc", "exp", "run", "--temp", "-S", "tile.patches_per_slide=6", "--force", "tile"
    )
    assert "tile: 0 slides to make, 12 reused" in again


def test_the_queue_runs_every_value(chain):
    repository, _ = chain
    repository.run("dvc", "exp", "run", "--queue", "-S", "evaluate.seeds=3,4")
    repository.run("dvc", "queue", "start", "-j", "1")
    status = repository.run("dvc", "queue", "status")
    assert status.count("Success") >= 2 and "Failed" not in status
    shown = json.loads(repository.run("dvc", "exp", "show", "--json"))
    assert {'"seeds": 3', '"seeds": 4'} <= set(re.findall(r'"seeds": \d', json.dumps(shown)))


def test_an_encoder_from_elsewhere_costs_only_that(chain):
    repository, _ = chain
    copied = repository.folder / "slides" / "earlier"  # git ignores it
    shutil.copytree(repository.folder / "data/pretrain/untrained", copied)
    with_it = ["pretrained", "untrained", "earlier"]
    changes = {"fetch.encoders": {"earlier": "slides/earlier"}, "embed.encoders": with_it}
    set_params(repository.folder, changes)
    output = repository.run("dvc", "repro", "embed@earlier")
    assert stages_run(output) == {"fetch", "embed"}
    assert "embed: 0 slides to make, 12 reused" in output  # the weights are those of untrained
    (copied / "encoder.json").write_text((copied / "encoder.json").read_text() + "\n")
    assert stages_run(repository.run("dvc", "repro", "embed@earlier")) == {"fetch", "embed"}
    repository.run("git", "checkout", "-q", ".")
    repository.run("dvc", "checkout")


def test_a_new_slide_is_the_only_one_made_and_going_back_is_free(chain):
    repository, _ = chain
    set_params(repository.folder, {"cohort.synthetic.slides": 13})
    output = repository.run("dvc", "repro", "perturb")
    for stage in PER_SLIDE:
        assert f"{stage}: 1 slides to make, 12 reused" in output
    set_params(repository.folder, {"cohort.synthetic.slides": 12})
    output = repository.run("dvc", "repro", "perturb", "--no-run-cache")
    assert "perturb: 0 slides to make, 12 reused" in output
    repository.run("git", "checkout", "-q", ".")
    repository.run("dvc", "checkout")


def test_pushed_stores_are_pulled_and_refill_the_cache(chain, tmp_path):
    repository, _ = chain
    remote, copy = tmp_path / "remote", Repository(tmp_path / "copy")
    repository.run("dvc", "remote", "add", "-f", "-d", "store", str(remote))
    repository.run("dvc", "push", "-q")
    repository.commit()
    repository.run("git", "clone", "-q", str(repository.folder), str(copy.folder))
    copy.run("dvc", "pull", "-q")
    assert stages_run(copy.run("dvc", "repro")) == set()
    assert re.search(r"[1-9]\d* results linked", copy.run("python", "-m", "stages.common.cache"))
    set_params(copy.folder, {"cohort.synthetic.slides": 13})
    output = copy.run("dvc", "repro", "perturb")
    for stage in PER_SLIDE:
        assert f"{stage}: 1 slides to make, 12 reused" in output


def test_a_slide_is_few_files(chain):
    """DVC and network file systems pay by the file."""
    repository, _ = chain
    for stage in (*PER_SLIDE, "embed/pretrained"):
        folders = [path for path in (repository.folder / "data" / stage).iterdir() if path.is_dir()]
        assert len(folders) == 12
        for folder in folders:
            assert sum(path.is_file() for path in folder.rglob("*")) <= 12


def test_a_slide_that_fails_is_quarantined_and_all_stages_go_on_without_it(chain):
    repository, _ = chain
    slides = repository.folder / "slides"
    with (repository.folder / "data/cohort/cohort.csv").open() as opened:
        drawn = list(csv.DictReader(opened))
    slides.mkdir(exist_ok=True)
    lines = ["slide,slide_id,label,patient,split,mpp"]
    for row in drawn:
        name, rest = f"{row['slide_id']}.tiff", ("label", "patient", "split", "mpp")
        shutil.copy(repository.folder / row["path"], slides / name)
        lines.append(",".join([name, row["slide_id"], *(row[key] for key in rest)]))
    Image.new("RGB", (1024, 1024), "white").save(slides / "blank.png")
    lines.append(f"blank.png,blank,{drawn[0]['label']},p-blank,test,0.25")
    (slides / "labels.csv").write_text("\n".join(lines) + "\n")
    set_params(repository.folder, {"cohort.source": "folder"})
    output = repository.run("dvc", "repro", fails=True)
    assert "tile: 1 of 13 slides failed" in output and "blank has no foreground" in output
    set_params(repository.folder, {"on_error": "quarantine"})
    output = repository.run("dvc", "repro")
    assert "tile: 1 slides to make, 12 reused" in output  # again, and no other
    assert stages_run(output) >= {"tile", "split", "evaluate", "compare", "report"}
    page = (repository.folder / "data/report/index.html").read_text()
    assert "1 of 13 slides failed and were left out." in page and "blank has no foreground" in page
    assert "blank" not in (repository.folder / "data/split/splits.csv").read_text()
    metrics = json.loads((repository.folder / "data/tile/metrics.json").read_text())
    assert (metrics["slides"], metrics["failed"]) == (12, 1)
    assert stages_run(repository.run("dvc", "repro")) == set()
    repository.run("git", "checkout", "-q", ".")
    shutil.rmtree(slides)
    repository.run("dvc", "checkout")


def test_a_bad_param_stops_the_stage_with_one_sentence(chain):
    repository, _ = chain
    set_params(repository.folder, {"tile.mpp": 0.1})
    output = repository.run("dvc", "repro", "tile", fails=True)
    assert "0.1 mpp patches would be invented: raise tile.mpp" in output
    assert "Traceback" not in output
    repository.run("git", "checkout", "-q", ".")
    assert stages_run(repository.run("dvc", "repro")) == set()
