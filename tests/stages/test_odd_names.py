"""A slide called as hospitals call them, through tile's real stage, the cache and DVC."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from stages import tile
from stages.common import cache, cohort, stores
from tests.stages.test_tile import paint, row

ROOT = Path(__file__).resolve().parents[2]
ODD = "สไลด์ 1, A&B; (it's) #3!"


def dvc(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words, "-q"], check=True, capture_output=True)


def test_an_odd_name_goes_through_tile_and_dvc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(values))
    path = paint(tmp_path / f"{ODD}.svs")
    cohort.write_rows(Path("data/cohort"), [row(path, ODD)], ["a"])
    tile.main()
    store = Path("data/tile") / ODD / "patches.zarr"
    assert stores.count_patches(store) > 0
    first = next(file for file in store.rglob("*") if file.is_file())
    assert first.stat().st_nlink == 2  # the cache's and this one
    dvc("init", "--no-scm")
    dvc("add", "data/tile")
    content = first.read_bytes()
    subprocess.run(["rm", "-r", "data/tile"], check=True)
    dvc("checkout")
    assert first.read_bytes() == content and os.listdir("data/tile").count(ODD) == 1
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "other"))
    assert cache.import_outputs() == 1
