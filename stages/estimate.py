"""What a whole run takes on the disks, told before it begins.

    python -m stages.estimate    (make estimate)

It reads the cohort, if there is one, and a few patches of its slides; it writes nothing and is no
stage of the pipeline. What was made by the same settings and code and lies in the cache is taken
off. Of pretraining it counts the checkpoints kept while it runs, and the encoders that it leaves;
nothing of these is to write when the encoder in data/pretrain was made so, and no view is missing.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.common import (
    architectures,
    backbones,
    cache,
    cohort,
    disk,
    encoders,
    fingerprint,
    footprint,
    footprint_sample,
    params,
    plugins,
    readers,
    run,
    training,
)
from stages.common.disk import Needs, human
from stages.common.footprint_sample import Sample
from stages.common.spec import EncoderSpec
from stages.common.training import PretrainParams
from stages.methods import fitted

logger = logging.getLogger(__name__)

ADAM_STATES = 2  # moments of each weight that is trained
ENCODERS = 2  # pretrained and untrained
REMEDY = "lower tile.patches_per_slide, set perturb.store to recipe, or name fewer embed.encoders"


@dataclass(frozen=True)
class Slides:
    """Those of the run."""

    count: int
    ids: frozenset[str]  # empty: not known yet
    sample: Sample

    @property
    def patches(self) -> float:
        """Of a slide, at most."""
        return self.sample.patches


@dataclass(frozen=True)
class Row:
    """A line of the table, bytes."""

    name: str
    whole: float
    missing: float


def main(data: Path = Path("data")) -> None:
    """Print the table, and refuse as the stages would.

    Raises:
        FileNotFoundError: it is not known how many slides there are.
        OSError: a disk has less room than the run needs.
    """
    cut = SimpleNamespace(**params.section_of("tile"))
    slides = _slides(data / "cohort", cut)
    each, trained = _cut(slides, cut), data / "pretrain"
    rows = [*each, _pretrain(cut, trained, each[-1]), *_bags(slides, cut, trained)]
    missing = sum(row.missing for row in rows)
    rows.append(Row("all", sum(row.whole for row in rows), missing))
    logger.info("%s", _basis(slides, cut))
    logger.info("%-20s %10s %10s %10s", "", "whole run", "in cache", "to write")
    for row in rows:
        cells = (human(one) for one in (row.whole, row.whole - row.missing, row.missing))
        logger.info("%-20s %10s %10s %10s", row.name, *cells)
    for place in disk.places(data):
        logger.info("%s: %s free", place.absolute(), human(disk.free_bytes(place)))
    disk.check("the run", Needs(missing, REMEDY, firm=footprint.is_firm(cut)), data)


def _slides(folder: Path, cut: Any) -> Slides:
    if (folder / "cohort.csv").is_file():
        rows = cohort.read_rows(folder)
        ids = frozenset(row.slide_id for row in rows)
        return Slides(len(rows), ids, footprint_sample.look(rows, cut))
    source = params.section_of("cohort")["source"]
    drawn = params.section_of("cohort.synthetic")["slides"]
    if source != "synthetic" or not cut.patches_per_slide:
        raise FileNotFoundError(
            f"no {folder / 'cohort.csv'}, which says how many slides there are: run `dvc repro "
            "cohort` first, it reads the slides and writes next to nothing"
        )
    return Slides(drawn, frozenset(), footprint_sample.look([], cut))


def _basis(slides: Slides, cut: Any) -> str:
    found = slides.sample
    source = f"measured on {found.slides} of the slides" if found.slides else "by experience"
    bound = "" if cut.patches_per_slide else " (all positions of a slide)"
    return (
        f"{slides.count} slides of {found.patches:.0f} patches at most{bound}, "
        f"{human(found.stored)} a patch and {human(found.shuffled)} shuffled, {source}"
    )


def _cut(slides: Slides, cut: Any) -> list[Row]:
    """The stages that make something of each slide once."""
    each, found = slides.patches, slides.sample
    detector, views = params.section_of("detect")["detector"], params.section_of("perturb")
    seed = {"seed": params.load(params.Top).seed}
    return [
        _row(
            *("tile", slides, lambda n: footprint.tile(n, n * each, found.stored, cut)),
            *(("stages.tile", *readers.modules()), {**vars(cut), **seed}),
        ),
        _row(
            *("detect", slides, lambda n: footprint.detect(n, n * each)),
            ("stages.detect", f"stages.detectors.{detector}"),
            params.section_of(f"detect.{detector}"),
        ),
        _row(
            *("perturb", slides),
            lambda n: footprint.perturb(n, n * each, found.shuffled, views["store"]),
            *(("stages.perturb",), {**views, **seed}),
        ),
    ]


def _pretrain(cut: Any, trained: Path, views: Row) -> Row:
    """Checkpoints, one more than are kept while it is written, and the encoders."""
    settings = params.load(PretrainParams, "pretrain")
    encoder = architectures.build(_spec(settings, cut), empty=True)
    total = (settings.keep_checkpoints + 1) * _checkpoint_bytes(settings, cut)
    total += ENCODERS * _bytes(encoder.state_dict())
    done = not views.missing and _is_made(trained / "pretrained", settings)
    return Row("pretrain", total, 0 if done else total)


def _is_made(folder: Path, settings: PretrainParams) -> bool:
    """Whether the encoder was made by this code and these settings, on the data it names."""
    if not (folder / encoders.DESCRIPTION).is_file():
        return False
    made = encoders.describe(folder).get("provenance", {})
    if "counts" not in made:  # it is from elsewhere
        return False
    own = fitted(_of_method(settings), made["counts"]["patches"])
    now = training.provenance(made["data"], settings, own, params.load(params.Top))
    return now["run"] == made["run"]


def _of_method(settings: PretrainParams) -> Any:
    module = plugins.load("methods", settings.method)
    return params.load(module.Params, f"pretrain.{settings.method}")


def _checkpoint_bytes(settings: PretrainParams, cut: Any) -> int:
    build = plugins.load("methods", settings.method).build
    encoder = architectures.build(_spec(settings, cut), empty=True)
    with torch.device("meta"):  # shapes only: no weight is made
        method = build(encoder, _of_method(settings), settings.global_px)
    trained = {name: one for name, one in method.named_parameters() if one.requires_grad}
    return _bytes(method.state_dict()) + ADAM_STATES * _bytes(trained)


def _spec(settings: PretrainParams, cut: Any) -> EncoderSpec:
    return backbones.describe(settings, params.load(params.Top), cut.patch_px, cut.mpp)


def _bytes(state: dict[str, Any]) -> int:
    return sum(one.nbytes for one in state.values() if isinstance(one, torch.Tensor))


def _bags(slides: Slides, cut: Any, trained: Path) -> list[Row]:
    settings, rows = params.section_of("embed"), []
    for name in settings["encoders"]:
        dim = architectures.build(_encoder(name, cut, trained), empty=True).num_features

        def needs(count: int, dim: int = dim) -> Needs:
            return footprint.embed(count, count * slides.patches, dim, settings["central_crop"])

        weights = _weights(trained / name)
        rows.append(_row(f"embed {name}", slides, needs, ("stages.embed",), settings, weights))
    return rows


def _encoder(name: str, cut: Any, trained: Path) -> EncoderSpec:
    """What an encoder is, or will be where it is not trained or fetched yet."""
    entry = params.section_of("fetch.encoders").get(name)
    folder = cohort.locate(entry) if isinstance(entry, str) else trained / name
    if folder.is_dir():
        return encoders.describe(folder)["spec"]
    spec = _spec(params.load(PretrainParams, "pretrain"), cut)
    if not isinstance(entry, dict):
        return spec
    own = {"architecture": entry["backbone"], "image_px": entry["global_px"]}
    dense = {"token_px": entry["token_px"], "sparse_topk": 0, "irpe": "none", "lora": None}
    return replace(spec, **own, **dense)


def _weights(folder: Path) -> str:
    """Digest of an encoder; of one that is not trained yet none, which no bag was made with."""
    return encoders.digest_of(folder) if folder.is_dir() else "none"


def _row(
    name: str,
    slides: Slides,
    needs: Callable[[int], Needs],
    code: tuple[str, ...],
    settings: dict[str, Any],
    weights: str = "",
) -> Row:
    there = _there(name.split()[0], slides.ids, code, settings, weights)
    return Row(name, needs(slides.count).bytes_, needs(slides.count - there).bytes_)


def _there(
    stage: str, ids: frozenset[str], code: tuple[str, ...], settings: dict[str, Any], weights: str
) -> int:
    """How many slides have a result in the cache that was made by this code and these settings."""
    digest, found = fingerprint.code_digest(code), set()
    for file in (cache.root() / stage).glob(f"*/*/{cache.MADE}"):
        made = json.loads(file.read_text("utf-8"))
        told = made["settings"].keys() & settings.keys() - {"device"}  # a kind there, a wish here
        alike = all(made["settings"][name] == settings[name] for name in told)
        if made["code"] == digest and alike and weights in ("", *made["inputs"][1:]):
            found.add(made["slide_id"])
    return len(found & ids)


if __name__ == "__main__":
    run.start(main)
