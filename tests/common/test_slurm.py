"""SLURM: the script that sbatch gets, and slides made by jobs that an sbatch of ours starts."""

import os
import signal
import sys
import threading
from pathlib import Path

import dask
import pytest

from stages.common import cluster, params, perslide, slurm
from stages.common.perslide import Job
from tests.common import daemons, toy

SETTINGS = """
engine:
  workers: 2
  scheduler: slurm
  wait_minutes: 0.5
  slurm:
    jobs: 2
    cores: 3
    memory: 2GB
    walltime: "01:30:00"
    partition: long
    account: ""
    interface: ""
    directives: [--nice=100]
    gpu_directives: [--gres=gpu:1]
    prologue: [module load openslide]
"""
# As sbatch: the job begins in a session of its own, elsewhere; its number is printed.
SBATCH = """#!/bin/bash
cd / && cp "$1" "$JOBS/$$.sh"
PATH=$PATH:$JOBS setsid bash "$JOBS/$$.sh" > "$JOBS/$$.log" 2>&1 &
echo $! >> "$JOBS/pids"
echo "Submitted batch job $!"
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A repository of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(daemons.ROOT))
    Path("params.yaml").write_text(SETTINGS)


def job_script(cuda: bool) -> list[str]:
    settings = params.load(slurm.SlurmParams, "engine.slurm")
    with slurm.cluster(settings, cuda, cluster.WORKER_ENVIRONMENT) as made:
        return made.job_script().splitlines()


def test_the_job_script_asks_for_what_is_set():
    lines = job_script(cuda=True)
    assert lines[0].startswith("#!")
    for wanted in ("-p long", "--cpus-per-task=3", "--mem=2G", "-t 01:30:00", "--nice=100", "-n 1"):
        assert f"#SBATCH {wanted}" in lines
    assert not any(line.startswith("#SBATCH -A") for line in lines)
    for name, value in cluster.WORKER_ENVIRONMENT.items():
        assert f"export {name}={value}" in lines
    begin, worker = lines.index("module load openslide"), lines[-1]
    assert lines[begin + 1] == f"cd {Path.cwd()}"
    for wanted in (sys.executable, "--nthreads 1", "--nanny", "--memory-limit 1.86GiB"):
        assert wanted in worker
    assert "#SBATCH --gres=gpu:1" in lines and "--gres" not in "\n".join(job_script(cuda=False))


def test_slides_are_made_by_jobs_and_a_job_that_ends_is_asked_for_anew(tmp_path, monkeypatch):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    scancel = '#!/bin/bash\nkill -- -"$1"\n'
    for name, text in {"sbatch": SBATCH, "scancel": scancel, "module": "#!/bin/bash\n"}.items():
        (jobs / name).write_text(text)
        (jobs / name).chmod(0o755)
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PATH", f"{jobs}:{os.environ['PATH']}")
    work = [Job(f"s{number:02d}", (), {"wait": 0.5}) for number in range(14)]

    def end_a_job() -> None:
        daemons.wait_for(2)
        os.killpg(int((jobs / "pids").read_text().split()[0]), signal.SIGKILL)

    ender = threading.Thread(target=end_a_job)
    ender.start()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "0.2s"}):
        code = ("stages.common.stores",)
        made = perslide.run("toy", toy.make, work, Path("data/toy"), code=code, settings={})
    ender.join()
    assert len(made) == daemons.finished() == 14
    assert len((jobs / "pids").read_text().split()) == 3


def test_refuses_jobs_of_nothing():
    Path("params.yaml").write_text(SETTINGS.replace("jobs: 2", "jobs: 0"))
    with pytest.raises(ValueError, match=r"engine\.slurm\.jobs is 0: it must be 1 or more"):
        params.load(slurm.SlurmParams, "engine.slurm")
