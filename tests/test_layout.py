"""The layout's promises: imports point one way, one door a library, dvc.yaml knows every file."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

from stages.common import fingerprint, plugins

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("stages/**/*.py"), *ROOT.glob("cytossl_core/**/*.py")])
FAMILIES = ("sources", "readers", "detectors", "methods", "heads")
DOORS = {
    "openslide": {"stages/common/pyramid.py"},
    "tifffile": {"stages/common/tiff.py", "stages/sources/synthetic.py"},
    "kornia_rs": {"stages/common/tiff.py"},
    "pylibCZIrw": {"stages/readers/czi.py"},
    "zarr": {"stages/common/stores.py", "stages/common/jpeg.py"},
    "timm": {"stages/common/architectures.py", "stages/heads/_optimizers.py"},
    "peft": {"stages/common/lora.py"},
    "yaml": {"stages/common/params.py"},
    "h5py": {"stages/common/interop.py"},
    "distributed": {f"stages/common/{name}.py" for name in ("cluster", "perslide", "workers")},
    "dask": {"stages/common/cluster.py"},
    "dask_jobqueue": {"stages/common/slurm.py"},
    "dvc": set(),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rank(module: str) -> int:
    """How high a first-party module stands: core 0, common 1, plug-in families 2, verbs 3."""
    parts = module.split(".")
    if parts[0] == "cytossl_core":
        return 0
    if parts[1:2] == ["common"]:
        return 1
    return 2 if parts[1:2] and parts[1] in FAMILIES else 3


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    module = name_of(path).removesuffix(".py").replace("/", ".")
    for wanted in imports(path):
        if wanted.split(".")[0] not in ("stages", "cytossl_core"):
            continue
        lower = rank(wanted) < rank(module)
        together = wanted.split(".")[:2] == module.split(".")[:2]
        beside = rank(wanted) == rank(module) < 3 and together
        assert lower or beside, f"{module} may not import {wanted}"


def test_the_core_imports_torch_and_jaxtyping_only():
    allowed = {"torch", "jaxtyping", "triton", "cytossl_core", *sys.stdlib_module_names}
    for path in ROOT.glob("cytossl_core/**/*.py"):
        for wanted in imports(path):
            assert wanted.split(".")[0] in allowed, f"{name_of(path)} imports {wanted}"


@pytest.mark.parametrize("library", DOORS)
def test_one_library_one_door(library):
    users = {
        name_of(path)
        for path in FILES
        if any(wanted.split(".")[0] == library for wanted in imports(path))
    }
    assert users <= DOORS[library], f"{library} is imported in {sorted(users - DOORS[library])}"


def stage_entries() -> list[tuple[str, dict]]:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return [(name, entry.get("do", entry)) for name, entry in stages.items()]


@pytest.mark.parametrize(("stage", "entry"), stage_entries(), ids=lambda it: str(it)[:20])
def test_deps_cover_every_file_a_stage_reaches(stage, entry):
    module = re.search(r"python -m (stages\.\w+)", entry["cmd"])[1]
    listed = [dep for dep in entry["deps"] if isinstance(dep, str)]
    plugged = {
        family: path
        for family in FAMILIES
        for path in listed
        if path.startswith(f"stages/{family}/${{")
    }
    reached = fingerprint.reach((module,))
    for family in plugged:
        for name in plugins.names(family):
            reached |= fingerprint.reach((f"stages.{family}.{name}",))
    for path in sorted({fingerprint.path_of(name).as_posix() for name in reached}):
        covered = any(path == dep or path.startswith(f"{dep}/") for dep in listed)
        named = any(
            path.startswith(f"stages/{family}/") and not Path(path).name.startswith("_")
            for family in plugged
        )
        empty = not (ROOT / path).read_text().strip().removeprefix('"""').strip()
        package = path.endswith("__init__.py")
        assert covered or named or package or empty, f"add {path} to deps of {stage}"


def test_plug_ins_loaded_by_name_are_deps():
    for stage, entry in stage_entries():
        module = re.search(r"python -m (stages\.\w+)", entry["cmd"])[1]
        files = [fingerprint.path_of(name) for name in fingerprint.reach((module,))]
        source = "\n".join((ROOT / file).read_text() for file in files)
        for family in re.findall(r'plugins\.load\("(\w+)"', source):
            assert any(
                dep == f"stages/{family}" or dep.startswith(f"stages/{family}/${{")
                for dep in entry["deps"]
            ), f"add stages/{family}/<its ${{...}}>.py to deps of {stage}"


def walk(values: object, place: str = "") -> list[str]:
    if isinstance(values, dict):
        return [
            found
            for key, value in values.items()
            for found in [f"{place}.{key}", *walk(value, f"{place}.{key}")]
        ]
    return []


@pytest.mark.parametrize("file", ["params.yaml", "profiles/paper.yaml"])
def test_no_param_has_a_name_that_dvc_ignores(file):
    """DVC's run cache drops keys called size and nfiles, and serves stale results."""
    for place in walk(yaml.safe_load((ROOT / file).read_text())):
        assert place.rsplit(".", 1)[1] not in ("size", "nfiles"), f"rename {place} in {file}"


def test_the_profiles_have_the_same_keys():
    """The demo's and the paper's params differ in values only."""
    files = ("params.yaml", "profiles/paper.yaml")
    demo, paper = (walk(yaml.safe_load((ROOT / file).read_text())) for file in files)
    assert sorted(demo) == sorted(paper)


def test_the_lock_names_no_address():
    assert "://" not in (ROOT / "requirements.lock").read_text()
