"""Stage 5, pretrain: teach an encoder to know a patch again from other views of it.

    reads   data/perturb/<slide>/views.zarr   perturbed patches and their retained nuclei
            data/cohort/cohort.csv            which slides train
    writes  data/pretrain/pretrained          the encoder (layout: stages/common/encoders.py)
            data/pretrain/untrained           the same network before step 1
            data/pretrain/metrics.json        loss and health at the end
            data/pretrain/dvclive             the curves, live
            data/pretrain/views.png           first views: patch, then its views in order

Run it with `dvc repro pretrain`, on several GPUs `torchrun --nproc-per-node 8 -m stages.pretrain`
before; its settings are the `pretrain` section of params.yaml, a section in there named like the
method, `sparse_topk` and `irpe`. A run that was stopped or killed goes on from its last checkpoint
when it is run again, and ends with the weights of an unbroken run.
"""

import math
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from stages.common import (
    architectures,
    backbones,
    card,
    checkpoint,
    encoders,
    optimizer,
    params,
    plugins,
    preflight,
    ranks,
    run,
    sheet,
    training,
    viewset,
)
from stages.common.chance import keys_of
from stages.common.journal import Journal
from stages.common.paired import PairedViews
from stages.common.probe import Probe
from stages.common.ranks import Ranks
from stages.common.spec import EncoderSpec
from stages.common.training import Plan, PretrainParams
from stages.common.views import make_views
from stages.common.viewset import Batch, ViewSet
from stages.common.watch import Alarm
from stages.methods import Method, fitted, sizes

SHEET_ROWS = 8


def main(
    data: Path,
    target: Path,
    settings: PretrainParams,
    of_method: Any,
    top: params.Top,
    group: Ranks,
) -> None:
    """Train one encoder on the views in `data`, the folder that holds the results of all stages.

    `of_method` is the method's own section of the params.

    Raises:
        FileNotFoundError: the perturb stage has not run.
        ValueError: settings and views do not go together, or training diverged.
    """
    views = _view_set(data, settings, group)
    preflight.check_batch(settings, len(views), group.count)
    of_method = fitted(of_method, len(views))
    spec = backbones.describe(settings, top, views.patch_px, views.mpp)
    run.seed_everything(top.seed)
    method = _method(spec, settings, of_method, group)
    made = training.provenance(views.digest, settings, of_method, top)
    plan = Plan(settings, spec, top.seed, made, len(views) // settings.batch)
    if group.first:
        encoders.save(target / "untrained", method.encoder, spec, {**made, "steps": 0})
        _draw_views(target / "views.png", method, views, plan, group)
    curves = target / "dvclive" if group.first else None
    with Journal(curves, settings.log_steps, plan.total, plan.per_epoch) as journal:
        result = {"encoder": method.encoder, "journal": journal}
        if not group.agreed(group.first and checkpoint.finished(plan.folder, result, made)):
            with training.memory_explained(settings, group.count):
                train(method, views, plan, journal, _probe(data, plan, group), group)
            training.check_weights(method, plan.total)
            if group.first:
                checkpoint.finish(plan.folder, plan.total, result, made)
    if group.first:
        if not journal.has("rankme") and (probe := _probe(data, plan, group)):
            journal.amend(probe(method.encoder))  # it was switched on after the run
        counts = {"epochs": settings.epochs, "steps": plan.total, "views": len(views)}
        summary = journal.summary()
        run.write_metrics(target / "metrics.json", {**counts, **sizes(of_method), **summary})
        counted = {"slides": len(views.stores), "patches": len(views)}
        told = {**made, "steps": plan.total, "counts": counted, "metrics": summary}
        encoders.save(target / "pretrained", method.encoder, spec, told)
        card.write(target / "pretrained")


def _view_set(data: Path, settings: PretrainParams, group: Ranks) -> ViewSet:
    if getattr(plugins.load("methods", settings.method), "PAIRED", False):
        preflight.check_pairs(settings, group.count)
        return PairedViews(data)
    return ViewSet(data / "perturb", data / "tile", preflight.slides_of(settings, data / "cohort"))


def _method(spec: EncoderSpec, settings: PretrainParams, of_method: Any, group: Ranks) -> Method:
    encoder = group.with_norms(backbones.prepare(spec, settings))
    encoder = architectures.share_dropped_paths(encoder, group.rank, group.count)
    preflight.check_encoder(settings, encoder)
    if settings.gradient_checkpointing:
        encoder.set_grad_checkpointing()
    build = plugins.load("methods", settings.method).build
    method = build(encoder, of_method, spec.image_px).to(group.device).train()
    preflight.check_views(settings, method.view_policies)
    preflight.check_compile(settings, of_method)
    preflight.check_spread(settings, of_method)
    if settings.compile:
        for module in method.modules():
            if isinstance(module, type(encoder)):  # the teacher's, too
                module.compile(dynamic=False)  # each resolution by itself: few, and none changes
    return method


def train(
    method: Method,
    data: ViewSet,
    plan: Plan,
    journal: Journal,
    probe: Probe | None,
    group: Ranks,
) -> None:
    """Take all steps that are left after the newest checkpoint of `plan`.

    After SIGINT or SIGTERM on any rank the run leaves a checkpoint and ends.

    Raises:
        ValueError: loss or gradient is no longer finite, or the embeddings collapsed.
        SystemExit: a signal was received.
    """
    settings, device, passes = plan.settings, group.device, plan.settings.accumulate
    trained = [value for value in method.parameters() if value.requires_grad]
    adam = optimizer.build(trained, settings.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast == "fp16")
    parts = {"method": method, "optimizer": adam, "scaler": scaler, "journal": journal}
    first = checkpoint.resume(plan.folder, parts, plan.made, group)
    parallel, alarm = group.parallel(method), Alarm(settings.watch, training.warmup(settings))
    batches = journal.waiting(_batches(data, plan, first, group))
    with checkpoint.interruptible(group) as stopped:
        for step in _bar(settings.method, first, plan.total, group):
            progress, epoch = step / plan.total, step // plan.per_epoch
            rates = training.rates(settings, progress)
            optimizer.schedule(adam, **rates)
            total = torch.zeros((), device=device)
            for number, batch in enumerate(islice(batches, passes), start=1):
                keys = keys_of(plan.seed, epoch, batch.rows)
                views = _views(method, data, batch, keys, plan.spec, device)
                # Dropped paths: the same after a resume, and on any number of ranks.
                torch.manual_seed(int(keys_of(plan.seed, step, torch.tensor([number]))))
                with group.averaging(parallel, now=number == passes):
                    with training.autocast(settings, device):
                        loss = parallel(views, progress, keys) / passes
                    scaler.scale(loss).backward()
                total += loss.detach()
            scaler.unscale_(adam)
            norm = optimizer.clip_each(trained, settings.clip_norm)
            means = group.mean(torch.stack([total, norm, norm.new_tensor(len(stopped))]))
            loss, norm, stop = means.tolist()  # the one wait for the device
            training.check_finite(loss, norm, scaler, step, plan.folder)
            method.after_backward(progress)
            if math.isfinite(norm):  # else fp16 overflowed: the step is left out
                scaler.step(adam)
                method.after_step(progress)
            scaler.update()
            adam.zero_grad()
            journal.note(loss, norm, settings.batch)
            if journal.due(step + 1):
                probed = probe(method.encoder) if probe and plan.probes(step + 1) else {}
                health = group.agreed({**method.monitor(progress), **probed})
                journal.write(step + 1, {**rates, **health})
                alarm.look(journal.rows, progress)
            if group.first and (stop or plan.saves(step + 1)):
                checkpoint.save(plan.folder, step + 1, parts, plan.made, settings.keep_checkpoints)
            if stop and step + 1 < plan.total:
                group.wait()  # else torchrun would end the first rank while it writes
                checkpoint.leave([*stopped, signal.SIGTERM][0], step + 1, plan.total)


def _probe(data: Path, plan: Plan, group: Ranks) -> Probe | None:
    about = plan.settings.watch
    wanted = group.first and about.probe_epochs > 0
    return Probe(data, plan.spec, about, plan.seed) if wanted else None


def _batches(data: ViewSet, plan: Plan, first: int, group: Ranks) -> Iterator[Batch]:
    """This rank's patches from step number `first` on: a batch for each pass of each step."""
    settings = plan.settings
    rows = viewset.rows_of(data, settings.batch, plan.seed, range(first, plan.total))
    shares = (share for step in rows for share in group.share(step, settings.accumulate))
    pinned = group.device.type == "cuda"
    return iter(viewset.loader(data, shares, settings.workers, pinned))


def _bar(method: str, first: int, total: int, group: Ranks) -> tqdm:
    about = {"initial": first, "total": total, "unit": "step", "desc": method}
    return tqdm(range(first, total), **about, disable=not group.first)


def _views(
    method: Method,
    data: ViewSet,
    batch: Batch,
    keys: Int64[Tensor, " batch"],
    spec: EncoderSpec,
    device: torch.device,
) -> list[Float[Tensor, "batch 3 px px"]]:
    patches, policies = data.pixels(batch, device), method.view_policies
    return make_views(patches, batch.points, keys, policies, spec.mean, spec.std)


def _draw_views(path: Path, method: Method, data: ViewSet, plan: Plan, group: Ranks) -> None:
    first = next(viewset.rows_of(data, plan.settings.batch, plan.seed, range(1)))[:SHEET_ROWS]
    batch = viewset.collate([data[row] for row in first])
    keys = keys_of(plan.seed, 0, batch.rows)
    views = _views(method, data, batch, keys, plan.spec, group.device)
    patches = data.pixels(batch, group.device).permute(0, 2, 3, 1).cpu()
    sheet.write(path, patches, views, plan.spec.mean, plan.spec.std)


def command() -> None:
    """`python -m stages.pretrain`, or torchrun with `-m stages.pretrain`."""
    settings = params.load(PretrainParams, "pretrain")
    module = plugins.load("methods", settings.method)
    of_method = params.load(module.Params, f"pretrain.{settings.method}")
    data, top = Path("data"), params.load(params.Top)
    with ranks.joined() as group:
        main(data, data / "pretrain", settings, of_method, top, group)


if __name__ == "__main__":
    run.start(command)
