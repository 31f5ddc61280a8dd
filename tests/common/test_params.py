import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from stages.common import params


@dataclass(frozen=True)
class Inner:
    depth: int


@dataclass(frozen=True)
class Section:
    mpp: float
    patch_px: int
    codec: Literal["jpeg", "zstd"]
    scale: tuple[float, float]
    enabled: bool
    inner: Inner


GOOD = {
    "mpp": 0.25,
    "patch_px": 512,
    "codec": "jpeg",
    "scale": [0.4, 1],
    "enabled": True,
    "inner": {"depth": 3},
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"seed": 1, "tile": {**GOOD, **changes}}))
    return path


def test_reads_every_kind(tmp_path):
    section = params.load(Section, "tile", write(tmp_path, mpp=1))
    assert section == Section(1.0, 512, "jpeg", (0.4, 1.0), True, Inner(3))
    assert isinstance(section.mpp, float)


def test_a_map_that_is_no_field_is_another_section(tmp_path):
    assert params.load(Section, "tile", write(tmp_path, plugin={"a": 1})).patch_px == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 3}, "tile.overlap is unknown: The keys of tile are mpp, patch_px"),
        ({"pach_px": 3}, "tile.pach_px is unknown: did you mean patch_px?"),
        ({"patch_px": "512"}, "tile.patch_px is '512' (str): it must be int"),
        ({"patch_px": True}, "tile.patch_px is True (bool): it must be int"),
        ({"patch_px": None}, "tile.patch_px is None (NoneType): it must be int"),
        ({"codec": "png"}, "tile.codec is 'png': it must be one of jpeg, zstd"),
        ({"scale": [0.4]}, "tile.scale has 1 entries: it must have 2"),
        ({"scale": 0.4}, "tile.scale is 0.4: it must be a list"),
        ({"inner": {"depth": 3, "width": 1}}, "tile.inner.width is unknown"),
        ({"inner": {}}, "tile.inner.depth is missing"),
        ({"inner": 3}, "tile.inner is 3: it must be a map"),
    ],
)
def test_refuses_with_key_value_and_remedy(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        params.load(Section, "tile", write(tmp_path, **changes))


def test_missing_key_section_file_and_bad_yaml(tmp_path):
    path = write(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("  mpp: 0.25\n", ""))
    with pytest.raises(ValueError, match=r"tile\.mpp is missing"):
        params.load(Section, "tile", path)
    with pytest.raises(ValueError, match="section detect is missing"):
        params.load(Section, "detect", path)
    path.write_text("tile: [")
    with pytest.raises(ValueError, match="is not YAML"):
        params.load(Section, "tile", path)
    with pytest.raises(FileNotFoundError, match="run from the repository's root"):
        params.load(Section, "tile", tmp_path / "none.yaml")
