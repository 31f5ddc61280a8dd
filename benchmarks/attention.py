"""Time and memory of SR-attention against dense attention and the eager reference.

Run `python -m benchmarks.attention`. Contenders take turns within one run, so that a busy machine
slows all of them; a figure is the median over the turns, and its ratio to dense attention without
tables. Times are of the process's own CPU time where there is one thread (OMP_NUM_THREADS=1), which
leaves out what others use of a busy machine. `compiled` is torch.compile of the reference. Last
comes a whole DINO step of a ViT-tiny (paper's crops, 2 x 224 and 8 x 96 px, and the demo's) with
dense attention, with selection, and with selection and tables.
"""

import logging
import os
import statistics
import time
from dataclasses import replace
from itertools import accumulate, product

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from cytossl_core.attention import irpe_buckets, sr_attention
from stages.common import encoders, params
from stages.common.encoders import EncoderSpec
from stages.methods import dino

BATCHES, HEADS, TOKENS, HEAD_DIM, TOPK, TURNS = (
    (4, 32, 64, 256),
    (3, 6, 12),
    (37, 197, 1025),
    64,
    16,
    7,
)
MOST_SCORES = {"cpu": 2**24, "cuda": 2**31}  # larger shapes are left out
MOST_ENCODED = {"cpu": 2**26, "cuda": 2**30}  # elements of r^K in the reference
COMPILED_TOKENS = 197  # the reference is compiled, which takes long, for these shapes alone
STEPS = {"paper": (224, 96, 8, 8), "demo": (96, 48, 4, 16)}  # global, local px, locals, batch
log = logging.getLogger("benchmarks.attention")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    log.info("%s %s, %d threads, median of %d", device, dtype, torch.get_num_threads(), TURNS)
    log.info(
        "batch heads token irpe  path       forward     ratio  with backward     ratio    peak"
    )
    for batch, heads, token in product(BATCHES, HEADS, TOKENS):
        if batch * heads * token**2 <= MOST_SCORES[device]:
            for irpe in (False, True):
                compare(batch, heads, token, irpe, device, dtype)
    for name, sizes in STEPS.items():
        compare_steps(name, *sizes, device)


def compare(batch, heads, token, irpe, device, dtype) -> None:
    shape = (3, batch, heads, token, HEAD_DIM)
    qkv = [t.requires_grad_() for t in torch.randn(shape, device=device, dtype=dtype)]
    side = round((token - 1) ** 0.5)
    buckets, count = irpe_buckets(side, side, device=device)
    tables = {}
    if irpe:
        for name in ("table_q", "table_k", "table_v"):
            tables[name] = torch.randn(1, count, HEAD_DIM, device=device).mul_(0.1).requires_grad_()
    leaves = [*qkv, *tables.values()]
    torch.compiler.reset()  # else torch gives up after eight shapes and runs eagerly
    compiled = torch.compile(lambda: reference(), dynamic=False)

    def reference():
        return sr_attention(*qkv, topk=TOPK, buckets=buckets, backend="reference", **tables)

    def attend(path):
        if path == "dense":
            return F.scaled_dot_product_attention(*qkv)
        if path == "compiled":
            return compiled()
        return sr_attention(*qkv, topk=TOPK, buckets=buckets, backend=path, **tables)

    def forward(path):
        with torch.no_grad():
            attend(path)

    def both(path):
        out = attend(path)
        torch.autograd.grad(out, qkv if path == "dense" else leaves, torch.ones_like(out))

    paths = ["dense", "torch"] + (["triton"] if device == "cuda" else [])
    if not irpe or heads * token**2 * HEAD_DIM <= MOST_ENCODED[device]:
        paths += ["reference"] + (["compiled"] if token == COMPILED_TOKENS else [])
    times = [median_times(work, paths, device) for work in (forward, both)]
    for path in paths:
        row = (batch, heads, token, "qkv" if irpe else "none", path)
        milliseconds = [(1e3 * t[path], t[path] / t["dense"]) for t in times]
        peak = peak_mib(both, path, device)
        log.info(
            "%5d %5d %5d %-5s %-9s %6.1f ms %8.2fx  %9.1f ms %8.2fx %4.0f MiB",
            *row, *milliseconds[0], *milliseconds[1], peak,
        )  # fmt: skip


def compare_steps(name, global_px, local_px, local_views, batch, device) -> None:
    """Log what a step of DINO takes: forward, backward, optimizer and teacher, without loading."""
    settings = params.load(dino.Params, "pretrain.dino")
    policies = {"local_px": local_px, "local_views": local_views}
    settings = replace(settings, **policies)
    views = [torch.randn(batch, 3, global_px, global_px, device=device) for _ in range(2)]
    views += [torch.randn(batch, 3, local_px, local_px, device=device) for _ in range(local_views)]
    kinds = {"dense": (0, "none"), "top 16": (TOPK, "none"), "top 16, qkv": (TOPK, "qkv")}
    methods = {kind: method_of(global_px, *of, settings, device) for kind, of in kinds.items()}
    adams = {kind: torch.optim.Adam(m.student.parameters()) for kind, m in methods.items()}

    def step(kind):
        with torch.autocast(device, torch.bfloat16, device == "cuda"):
            loss = methods[kind](views, 0.5, torch.arange(batch))
        loss.backward()
        adams[kind].step()
        adams[kind].zero_grad()
        methods[kind].after_step(0.5)

    seconds = median_times(step, list(kinds), device)
    for kind, time_of in seconds.items():
        slower = 100 * (time_of / seconds["dense"] - 1)
        log.info("DINO step, %-5s %-11s %8.1f ms %+6.1f %%", name, kind, 1e3 * time_of, slower)


def method_of(image_px, topk, irpe, settings, device) -> dino.DINO:
    spec = EncoderSpec(
        "vit_tiny_patch16_224", image_px, 16, topk, irpe, encoders.MEAN, encoders.STD, 512, 0.25
    )
    return dino.build(encoders.build(spec), settings, image_px).to(device).train()


def median_times(work, paths, device, turns=TURNS) -> dict[str, float]:
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds = {path: [] for path in paths}
    for turn in range(turns + 1):
        for path in paths:
            synchronise(device)
            start = clock()
            work(path)
            synchronise(device)
            if turn:  # the first turn warms up
                seconds[path].append(clock() - start)
    return {path: statistics.median(found) for path, found in seconds.items()}


def synchronise(device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(work, path, device) -> float:
    """Most memory of tensors at any time, above what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(path)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work(path)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes, initial=0)) / 2**20


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, which it prints

if __name__ == "__main__":
    main()
