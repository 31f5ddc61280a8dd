"""Which first-party files make a result, and a digest of what they say.

The digest is taken over syntax trees without docstrings, so that a comment, a docstring or a line
break costs nothing and a changed expression costs exactly what it touches.
"""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "cytossl_core")
# These move or read results, or draw pictures for people, and never change what a stage reads. A
# picture that is there already stays as it was drawn.
ENGINE = frozenset(
    f"stages.{name}"
    for name in (
        "common.perslide",
        "common.cluster",
        "common.disk",
        "common.footprint",
        "common.footprint_sample",
        "common.dispatch",
        "common.failures",
        "common.progress",
        "common.results",
        "common.slurm",
        "common.workers",
        "common.cache",
        "common.digests",
        "common.fingerprint",
        "common.params",
        "common.plugins",
        "common.run",
        "common.devices",
        "common.quality",
        "common.flags",
        "common.watch",
        "common.card",
        "common.sheet",
        "common.pictures",
        "detectors._outlines",
        "detectors._overlay",
    )
)


def code_digest(modules: tuple[str, ...], root: Path = ROOT) -> str:
    """Digest of every first-party file that `modules` reach by import, the engine's left out."""
    digest = hashlib.sha256()
    for name in sorted(reach(modules, root) - ENGINE):
        digest.update(f"{name}\n{_tree(_file(name, root))}\n".encode())
    return digest.hexdigest()


@functools.cache
def loaded(root: Path = ROOT) -> str:
    """Digest of all first-party files as they were when this process asked first.

    Of a process that asks before it imports them, it tells which code that process runs.
    """
    digest = hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in root.glob(f"{package}/**/*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def reach(modules: tuple[str, ...], root: Path = ROOT) -> set[str]:
    """Names of the first-party modules that `modules` reach by import, themselves included.

    Raises:
        ValueError: one of `modules` is no file of this repository.
    """
    found: set[str] = set()
    waiting = [module for module in modules if path_of(module, root)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(name, root)
    return found


def path_of(module: str, root: Path = ROOT) -> Path:
    """The file of a first-party module, relative to the repository."""
    file = _file(module, root)
    if file is None:
        raise ValueError(f"{module} is no module of this repository: name a file under {PACKAGES}")
    return file.relative_to(root)


def _imports(name: str, root: Path) -> list[str]:
    """First-party modules that one file imports anywhere in it, and the packages around it."""
    file = _file(name, root)
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    wanted = list(parents)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, name, file)
            wanted += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [module for module in wanted if _file(module, root) is not None]


def _base(node: ast.ImportFrom, name: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - (file.name == "__init__.py")
    package = name.rsplit(".", up)[0] if up else name
    return f"{package}.{node.module}" if node.module else package


def _file(module: str, root: Path) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@functools.cache
def _tree(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return _written(tree)


def _written(node: object) -> str:
    """A tree as text, empty fields left out: Python versions differ in which of those there are."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        inner = ",".join(f"{name}={_written(value)}" for name, value in fields)
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    return repr(node)
