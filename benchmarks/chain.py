"""Measure the demo from nothing: seconds, CPU seconds and peak memory of each stage.

    python -m benchmarks.chain

It copies the repository to a temporary folder with an empty cache, runs stage after stage there,
then `dvc repro` with nothing to do, then reads patches at random.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import yaml

from stages.common import stores

ROOT = Path(__file__).resolve().parents[1]
STAGES = (
    *("index", "cohort", "tile", "detect", "perturb", "pretrain"),
    *("embed", "split", "evaluate", "compare", "report"),
)
READS = 2000


@dataclass
class Cost:
    """What one command took."""

    wall_s: float
    cpu_s: float
    peak_mib: float


class Watch(threading.Thread):
    """Follows the memory of a process and all it starts."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.tree, self.peak, self.over = psutil.Process(process), 0, threading.Event()

    def run(self) -> None:
        """Poll; shared pages count once (PSS), else forked workers would count twice."""
        while not self.over.wait(0.1):
            try:
                members = [self.tree, *self.tree.children(recursive=True)]
                self.peak = max(self.peak, sum(_pss(member) for member in members))
            except psutil.NoSuchProcess:
                continue


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    """Run a command and account for it and its children."""
    before = os.times()
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    watch = Watch(process.pid)
    watch.start()
    _, errors = process.communicate()
    wall, after = time.perf_counter() - begun, os.times()
    watch.over.set()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    children = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    return Cost(wall, children, watch.peak / 2**20)


def clone(folder: Path) -> dict[str, str]:
    """The working tree as a repository of its own, and the environment to run it in."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    return {**environment, "CYTOSSL_CACHE": str(folder / ".cytossl")}


def read_at_random(folder: Path) -> int:
    """Decode patches of random slides; the count."""
    opened = [stores.open_patches(path) for path in sorted(folder.glob("*/patches.zarr"))]
    rng = np.random.default_rng(0)
    for at in rng.integers(len(opened), size=READS):
        store = opened[at]
        store[int(rng.integers(len(store)))]
    return READS


def say(line: str) -> None:
    """One line of the table."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        environment = clone(folder)
        say("| stage | wall s | CPU s | peak MiB |\n|---|---:|---:|---:|")
        costs = {}
        for stage in STAGES:
            cost = costs[stage] = measure(["dvc", "repro", stage], folder, environment)
            say(f"| {stage} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.peak_mib:.0f} |")
        total = [
            sum(getattr(cost, name) for cost in costs.values()) for name in ("wall_s", "cpu_s")
        ]
        peak = max(cost.peak_mib for cost in costs.values())
        say(f"| **all** | {total[0]:.1f} | {total[1]:.1f} | {peak:.0f} |")
        idle = [measure(["dvc", "repro"], folder, environment).wall_s for _ in range(5)]
        say(f"\n`dvc repro`, nothing changed: median {np.median(idle):.2f} s of 5")
        tile_rates(folder, environment)
        read_rates(folder / "data" / "tile")


def tile_rates(folder: Path, environment: dict[str, str]) -> None:
    """Patches tiled per second, the start of the worker processes included, 2 processes."""
    metrics = yaml.safe_load((folder / "data/tile/metrics.json").read_text())
    fresh = {**environment, "CYTOSSL_CACHE": str(folder / "empty")}
    cost = measure([sys.executable, "-m", "stages.tile"], folder, fresh)
    rate = metrics["patches"] / cost.wall_s
    say(f"tile: {rate:.0f} patches/s wall, {metrics['patches'] / cost.cpu_s:.0f} per CPU second")


def read_rates(folder: Path) -> None:
    """Patches decoded per second from the stores, in random order."""
    for workers in (1, 2):
        with get_context("fork").Pool(workers) as pool:
            begun = time.perf_counter()
            reads = sum(pool.map(read_at_random, [folder] * workers))
            rate = reads / (time.perf_counter() - begun)
        say(f"read at random, {workers} processes: {rate:.0f} patches/s")


if __name__ == "__main__":
    main()
