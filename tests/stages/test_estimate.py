"""The estimate beside what the stages then write."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import estimate, tile
from stages.common import checkpoint, cohort, encoders, optimizer, params, plugins, training
from stages.common.cohort import SlideRow

ROOT = Path(__file__).resolve().parents[2]
SLIDES = 4
PX = 1024  # at 0.5 mpp: 64 places for patches


@pytest.fixture
def values(tmp_path, monkeypatch) -> dict:
    """A repository with the demo's params; `write` puts changed ones in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    loaded = yaml.safe_load((ROOT / "params.yaml").read_text())
    loaded["tile"] |= {"patches_per_slide": 40, "sampling": "all"}
    write(loaded)
    return loaded


def write(values: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(values))


def add_cohort() -> None:
    """Slides of grain and dark spots: what JPEG keeps of a patch is alike everywhere."""
    rng = np.random.default_rng(0)
    rows = []
    for at in range(SLIDES):
        pixels = rng.normal(215, 12, (PX, PX, 3)).clip(0, 255)
        down, across = np.ogrid[:PX, :PX]
        pixels[(down % 64 < 12) & (across % 64 < 12)] = 40
        Image.fromarray(pixels.astype(np.uint8)).save(f"slide {at}.png")
        label = ("well", "ill")[at % 2]
        rows.append(
            SlideRow(f"s{at}", f"slide {at}.png", label, f"p{at}", "train", "0.5", f"d{at}")
        )
    cohort.write_rows(Path("data/cohort"), rows, ["well", "ill"])


def table(caplog) -> dict[str, list[str]]:
    """The cells of each line."""
    caplog.clear()
    caplog.set_level("INFO")
    estimate.main()
    lines = [record.message for record in caplog.records]
    split = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {cells[0]: cells[1:] for cells in split if len(cells) == 4}


def stored() -> int:
    return sum(path.stat().st_size for path in Path("data/tile").glob("*/patches.zarr/patch/c.*"))


def test_patches_take_what_was_said_and_are_not_counted_twice(values, caplog):
    add_cohort()
    found = estimate._slides(Path("data/cohort"), tile_cut(values))
    assert found.count == SLIDES and found.sample.slides == SLIDES
    before = table(caplog)
    assert before["tile"][1] == "0 bytes" and before["tile"][0] == before["tile"][2]
    assert "4 slides of 40 patches at most" in caplog.text
    tile.main()
    said = SLIDES * found.patches * found.sample.stored
    assert 0.95 * stored() < said < 1.1 * stored()
    after = table(caplog)
    assert after["tile"] == [before["tile"][0], before["tile"][0], "0 bytes"]
    values["tile"]["codec"] = "zstd"  # another result
    write(values)
    assert table(caplog)["tile"][1] == "0 bytes"


def tile_cut(values: dict) -> tile.TileParams:
    return tile.TileParams(**values["tile"])


@pytest.mark.parametrize("sampling", ["grid", "all"])
def test_with_all_places_the_extents_count(values, caplog, sampling):
    add_cohort()
    values["tile"] |= {"sampling": sampling, "stride_px": 64, "patches_per_slide": 0}
    write(values)
    table(caplog)
    assert "4 slides of 225 patches at most (all positions of a slide)" in caplog.text


def test_without_a_cohort_only_drawn_slides_can_be_counted(values, caplog):
    table(caplog)
    assert "80 slides of 40 patches at most" in caplog.text and "by experience" in caplog.text
    values["cohort"]["source"] = "folder"
    write(values)
    with pytest.raises(FileNotFoundError, match="run `dvc repro cohort` first"):
        estimate.main()


def test_recipes_take_little_and_more_encoders_more(values, caplog):
    pixels = table(caplog)
    values["perturb"]["store"] = "recipe"
    values["embed"]["encoders"] = ["untrained"]
    write(values)
    recipes = table(caplog)
    assert pixels["perturb"] != recipes["perturb"]
    assert "embed pretrained" in pixels and "embed pretrained" not in recipes


def test_encoders_from_elsewhere_have_bags_of_their_own_width(values, caplog):
    resnet = {"backbone": "resnet50", "weights": "timm", "token_px": 0, "global_px": 224}
    values["fetch"]["encoders"], values["embed"]["encoders"] = {"wide": resnet}, ["wide"]
    write(values)
    wide = table(caplog)["embed wide"][0]
    values["embed"]["encoders"] = ["untrained"]
    write(values)
    assert float(wide.split()[0]) > 4 * float(table(caplog)["embed untrained"][0].split()[0])


def test_a_run_that_the_disk_cannot_hold_is_refused(values):
    values["tile"]["patches_per_slide"] = 10**12
    write(values)
    with pytest.raises(OSError, match="the run has about .* PB to write, and the disk of .* has"):
        estimate.main()


def test_a_run_that_is_finished_has_nothing_to_write(values):
    settings, cut = params.load(training.PretrainParams, "pretrain"), tile_cut(values)
    spec, folder = estimate._spec(settings, cut), Path("data/pretrain")
    here, absent = estimate.Row("perturb", 9, 0), estimate.Row("perturb", 9, 1)
    assert estimate._pretrain(cut, folder, here).missing > 0
    own, top = estimate._of_method(settings), params.load(params.Top)
    made = training.provenance("digest of the views", settings, estimate.fitted(own, 640), top)
    told = {**made, "counts": {"slides": 16, "patches": 640}}
    encoders.save(folder / "pretrained", estimate.architectures.build(spec), spec, told)
    row = estimate._pretrain(cut, folder, here)
    assert row.missing == 0 < row.whole
    assert estimate._pretrain(cut, folder, absent).missing == row.whole  # new slides train anew
    values["pretrain"]["epochs"] += 1
    write(values)
    assert estimate._pretrain(cut, folder, here).missing == row.whole


def test_a_checkpoint_is_as_long_as_said(values, tmp_path):
    settings = params.load(training.PretrainParams, "pretrain")
    plugin = plugins.load("methods", "dino")
    encoder = estimate.architectures.build(estimate._spec(settings, tile_cut(values)))
    method = plugin.build(encoder, params.load(plugin.Params, "pretrain.dino"), settings.global_px)
    adam = optimizer.build(list(method.parameters()), "adam")
    for one in method.parameters():
        one.grad = one.detach().clone() if one.requires_grad else None
    adam.step()
    checkpoint.save(tmp_path / "run", 1, {"method": method, "optimizer": adam}, {}, 1)
    (file,) = (tmp_path / "run").iterdir()
    said = estimate._checkpoint_bytes(settings, tile_cut(values))
    assert said == pytest.approx(file.stat().st_size, rel=0.01)
