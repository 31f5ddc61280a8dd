"""Stage 5b, fetch: put encoders from elsewhere beside those that pretrain makes.

    reads   what `fetch.encoders.<name>` names: released weights, or an encoder of this project
            data/index/encoders/<name>.json   their digest, for DVC (stages/index.py)
    writes  data/pretrain/<name>              an encoder (layout: stages/common/encoders.py)

Run it with `dvc repro fetch@<name>`; every other encoder to compare is an entry of `fetch.encoders`
and a name under `embed.encoders`:

    resnet50: {backbone: resnet50, weights: timm, token_px: 0, global_px: 224}
    earlier: encoders/earlier    # a folder: data/pretrain/pretrained of another run, copied there

Released weights get the images that they were trained on, in mean and std, and the patches that
`tile` cuts, at their own mpp. Their licence is noted in encoder.json. An encoder of this project
stays as it is, and embeds patches of the side and mpp that it was trained on.
"""

import dataclasses
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stages.common import backbones, cohort, encoders, params, run

logger = logging.getLogger(__name__)

FILES = (encoders.DESCRIPTION, encoders.WEIGHTS, "MODEL_CARD.md")


@dataclass(frozen=True)
class Released:
    """An entry of fetch.encoders that is a map; its keys are called as in section pretrain."""

    backbone: str  # timm's name of a vision transformer or ResNet, or Prov-GigaPath's hub id
    weights: str  # timm (what its hub has), or the path of a safetensors file
    token_px: int  # side of a token; 0: a backbone without tokens
    global_px: int  # side of the image that an embedding is made from

    # As `backbones` wants them: weights as they are, all of their own.
    drop_path: ClassVar[float] = 0.0
    init_from: ClassVar[str] = ""
    adapter: ClassVar[str] = "none"


def main(name: str, target: Path) -> None:
    """Bring one encoder of `fetch.encoders` to the folder `target`.

    Raises:
        OSError: its files are not there, or timm's hub was not reached.
        ValueError: there is no such entry, or what it names is no encoder.
    """
    entries = params.section_of("fetch.encoders")
    if name not in entries:
        raise ValueError(
            f"params.yaml: fetch.encoders has no {name}, only {', '.join(entries) or 'nothing'}"
        )
    if target.exists():
        shutil.rmtree(target)
    if isinstance(entries[name], str):
        _copy(cohort.locate(entries[name]), target)
    else:
        _release(params.load(Released, f"fetch.encoders.{name}"), target)
    logger.info("fetch: %s in %s", name, target)


def _copy(folder: Path, target: Path) -> None:
    encoders.read(folder)  # else damage would be found by the stages after this one
    target.mkdir(parents=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _release(released: Released, target: Path) -> None:
    if released.weights == "none":
        raise ValueError(
            "params.yaml: fetch.encoders: weights is none: it must be timm or the path of a "
            "safetensors file"
        )
    tile = params.section_of("tile")
    dense = params.Top(seed=0, sparse_topk=0, irpe="none")
    spec = backbones.describe(released, dense, tile["patch_px"], float(tile["mpp"]))
    place = released.weights
    if place != "timm":
        place = str(cohort.locate(place))
    model = backbones.prepare(spec, dataclasses.replace(released, weights=place))
    model.base = dataclasses.replace(model.base, weights=released.weights)
    encoders.save(target, model, spec, {"method": "none: released weights"})


def command() -> None:
    """`python -m stages.fetch <name>`: one entry of fetch.encoders."""
    if len(sys.argv) != 2:
        raise ValueError(f"fetch got {sys.argv[1:]}: give one name of fetch.encoders")
    main(sys.argv[1], Path("data/pretrain") / sys.argv[1])


if __name__ == "__main__":
    run.start(command)
