"""A small pretraining run: a few drawn views, a tiny transformer, nine steps."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages import pretrain
from stages.common import cache, encoders, params, stores
from stages.common.ranks import Ranks
from stages.common.spec import LoraParams
from stages.common.watch import WatchParams
from stages.methods import dino
from stages.methods._masked import Masking

ROOT = Path(__file__).resolve().parents[2]
TOP = params.Top(seed=7, sparse_topk=3, irpe="k")
SETTINGS = pretrain.PretrainParams(
    method="dino",
    backbone="test_vit",
    weights="none",
    init_from="",
    splits=("train", "val", "test"),
    adapter="none",
    lora=LoraParams(rank=2, alpha=4.0, dropout=0.0),
    token_px=8,
    global_px=24,
    drop_path=0.1,
    epochs=3,
    batch=5,
    accumulate=1,
    optimizer="adam",
    learning_rate=0.01,
    final_learning_rate=1e-6,
    warmup_epochs=0.5,
    weight_decay=0.0,
    final_weight_decay=0.01,
    clip_norm=3.0,
    autocast="none",
    gradient_checkpointing=False,
    compile=False,
    workers=0,
    log_steps=2,
    checkpoint_steps=2,
    keep_checkpoints=2,
    watch=WatchParams(
        probe_epochs=0, probe_patches=9, neighbours=3, collapse_after=1.0, collapse_rows=2
    ),
)
ALONE = Ranks(0, 1, torch.device("cpu"))
DINO = dino.Params(
    local_views=1,
    local_px=16,
    global_scale=(0.4, 1.0),
    local_scale=(0.1, 0.4),
    rotation_degrees=180.0,
    flip=0.5,
    jitter=0.8,
    gray=0.0,
    blur=(0.0, 0.0, 0.0),
    solarize=0.0,
    prototypes=17,
    hidden_dim=19,
    bottleneck_dim=11,
    student_temperature=0.1,
    teacher_temperature_start=0.04,
    teacher_temperature=0.04,
    teacher_temperature_warmup=0.3,
    center_momentum=0.9,
    momentum=0.9,
    freeze_prototypes=0.1,
    koleo_weight=0.0,
    ibot=Masking(weight=0.0, chance=0.5, share=(0.1, 0.5)),
)
COUNTS, PX = {"a": 7, "b": 0, "c": 11}, 31  # 18 patches: 3 steps of 5 in an epoch, 9 in the run
STEPS = 9


def changed(**values) -> pretrain.PretrainParams:
    return dataclasses.replace(SETTINGS, **values)


def a_slide(source: Path, name: str, count: int, px: int = PX, mpp: float = 0.5) -> None:
    """A finished result of the perturb stage: stripes and blots, a nucleus or two in each."""
    rng = np.random.default_rng([ord(name[0]), px])
    patches = [cv2.GaussianBlur(rng.random((px, px, 3)), (0, 0), 2 + at % 3) for at in range(count)]
    attributes = {"slide_id": name, "mpp": mpp, "slide_mpp": 0.25, "input": "-"}
    per_patch = np.arange(count) % 3  # also patches without a point

    def make(folder: Path) -> None:
        stores.create_views(
            folder / "views.zarr",
            [cv2.normalize(patch, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U) for patch in patches],
            (rng.random((per_patch.sum(), 2)) * px).astype(np.float32),
            np.repeat(np.arange(count), per_patch),
            np.arange(count),
            px,
            attributes,
        )

    key = cache.key_of("perturb", name, (str(px), str(count)), {}, "")
    if not cache.entry("perturb", key).is_dir():
        cache.build("perturb", key, name, {}, make)
    cache.link(cache.entry("perturb", key), source / name)


def train(source: Path, settings=SETTINGS, of_method=DINO, top=TOP, target="made") -> Path:
    """A run into a folder beside the source."""
    pretrain.main(source.parent, source.parent / target, settings, of_method, top, ALONE)
    return source.parent / target


def forget_checkpoints() -> None:
    for file in (cache.root() / "pretrain").rglob("*.pt"):
        file.unlink()


def weights(folder: Path, encoder: str = "pretrained") -> bytes:
    return (folder / encoder / encoders.WEIGHTS).read_bytes()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = (folder / "dvclive" / "plots" / "metrics" / f"{name}.tsv").read_text().split("\n")
    return [(int(a), float(b)) for a, b in (line.split("\t") for line in lines[1:] if line)]


def write_params(folder: Path, settings=SETTINGS, of_method=DINO, top=TOP) -> None:
    """The params.yaml with which `python -m stages.pretrain` makes the run of `train`."""
    section = {**dataclasses.asdict(settings), settings.method: dataclasses.asdict(of_method)}
    plain = json.loads(json.dumps({**dataclasses.asdict(top), "pretrain": section}))
    (folder / "params.yaml").write_text(yaml.safe_dump(plain))


def start(*launcher: str) -> subprocess.Popen:
    """`python -m stages.pretrain` in the current folder, or with `launcher` before -m."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "stages.pretrain"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def checkpoints() -> list[Path]:
    return sorted((cache.root() / "pretrain").rglob("step-*.pt"))


def wait_for_checkpoint(child: subprocess.Popen) -> None:
    """Until `child` has written one that was not there, or has ended."""
    before = set(checkpoints())
    while child.poll() is None and not set(checkpoints()) - before:
        time.sleep(0.01)


def assert_close(first: Path, second: Path) -> None:
    """Weights within 1e-5 and losses within 1e-5, after steps that moved weights by 1e-3."""
    one, other, before = (
        load_file(folder / name / encoders.WEIGHTS)
        for folder, name in ((first, "pretrained"), (second, "pretrained"), (first, "untrained"))
    )
    # A key's bias cancels in the softmax: its gradient is rounding, which Adam makes a step of.
    names = [name for name in one if not name.endswith("qkv.bias")]
    for name in names:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)
    assert max((one[name] - before[name]).abs().max() for name in names) > 1e-3
    for (step, loss), (also, wanted) in zip(
        curve(first, "loss"), curve(second, "loss"), strict=True
    ):
        assert step == also
        assert loss == pytest.approx(wanted, abs=1e-5)
