"""The model card: MODEL_CARD.md beside an encoder, for the people who are given it.

It holds counts and numbers, and nothing that names a slide, a patient or a folder.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from stages.common import cohort, encoders, run
from stages.common.spec import Base, EncoderSpec

CARD = "MODEL_CARD.md"
LOAD = """\
import json, timm
from pathlib import Path
from cytossl_core.attention import with_sr_attention
from safetensors.torch import load_file

made = json.loads(Path("encoder.json").read_text())
encoder = with_sr_attention(timm.create_model(**made["timm"]), **made["sr_attention"])
encoder.load_state_dict(load_file("encoder.safetensors"))"""
LOAD_PLAIN = """\
import json, timm
from pathlib import Path
from safetensors.torch import load_file

made = json.loads(Path("encoder.json").read_text())
encoder = timm.create_model(**made["timm"])
encoder.load_state_dict(load_file("encoder.safetensors"))"""
LOAD_CNN = """\
import json
from pathlib import Path
from cytossl_core.cnn import PatchCNN
from safetensors.torch import load_file

made = json.loads(Path("encoder.json").read_text())
encoder = PatchCNN(**made["timm"])
encoder.load_state_dict(load_file("encoder.safetensors"))"""
MERGE = """\
# the folder holds adapters: merge them into the base weights once
# python -m stages.export <this folder> <new folder>
"""
TEXT = """\
# {title}

## What it is

An encoder of cytology patches: an image of {px} x {px} px in, an embedding of it out.

{what}

## How it was trained

{how}

## Data

{data}

No name of a slide or a patient is part of this folder; the digest tells data sets apart.

## Metrics

{metrics}

They were measured while training, on the training data: they say that training went well, and not
how good a diagnosis is. That is measured by `evaluate`, on slides of patients whose labels no head
has seen. In the training data are pixels of the slides of the cohort's splits named above.

## Intended use

Embedding patches of cytology slides for research: multiple-instance learning, retrieval, probing.
Not for diagnosis, and not for any decision about a patient.

## Limits

- It knows the stains, scanners and sites of its training data; elsewhere, measure first.
- Patches must be cut as those were: {patch_px} px at {mpp:g} microns per pixel.
- What rare cells look like it knows only if there were some.

## Licence

- weights: {weights}
- base weights: {base_weights}
- code: {code}

## How to load it

```python
{load}
```

Images are resized to {px} x {px} px, brought to 0 to 1, less mean {mean}, over std {std}. In this
project `stages.common.encoders.load(folder)` returns encoder and spec, and
`encoders.prepare(patches, spec)` does that to uint8 patches.
"""


def write(folder: Path) -> None:
    """Write the card of the encoder in `folder`, of what its encoder.json tells.

    Its provenance holds `counts` of the data and `metrics` of the training, by name.
    """
    described = encoders.describe(folder)
    spec, made = described["spec"], described["provenance"]
    text = TEXT.format(
        title=f"{spec.architecture}, {made.get('method', 'a method not stated')}",
        px=spec.image_px,
        what=_table(_what(spec)),
        how=_table(_how(described["base"], made)),
        data=_table({**made.get("counts", {}), "digest": made.get("data", "not stated")}),
        metrics=_table(made.get("metrics", {})),
        patch_px=spec.patch_px,
        mpp=spec.mpp,
        **described["licence"],
        load=_load(described),
        mean=_three(spec.mean),
        std=_three(spec.std),
    )
    with run.atomic(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _what(spec: EncoderSpec) -> dict[str, Any]:
    tokens = f"{spec.token_px} px" if spec.token_px else "none"
    lora = f"rank {spec.lora.rank}, alpha {spec.lora.alpha:g}" if spec.lora else "none"
    return {
        "architecture": spec.architecture,
        "tokens": tokens,
        "keys that a query attends to": spec.sparse_topk or "all",
        "relative positions": spec.irpe,
        "LoRA adapters": lora,
    }


def _how(base: Base, made: Mapping[str, Any]) -> dict[str, Any]:
    begun = {"none": "random numbers", "timm": "weights released through timm"}
    known = made.get("params", {}).get("pretrain", {})
    own = known.get(made.get("method"), {})
    names = ("splits", "epochs", "batch", "optimizer", "learning_rate", "weight_decay", "autocast")
    return {
        "method": made.get("method", "not stated"),
        "began with": begun.get(base.weights, f"the weights of {PurePath(base.weights).name}"),
        "steps": made.get("steps", "not stated"),
        **{name.replace("_", " "): _told(known[name]) for name in names if name in known},
        **({"prototypes": own["prototypes"]} if "prototypes" in own else {}),
        **({"splits": "train, with labels"} if made.get("method") == cohort.LABELLED else {}),
        "version of the code": made.get("version", "not stated"),
    }


def _told(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_number(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _three(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:g}" for value in values)


def _load(described: Mapping[str, Any]) -> str:
    lines = LOAD if described["sr_attention"] else LOAD_PLAIN
    lines = LOAD_CNN if "dim" in described["timm"] else lines
    return MERGE + lines if described["spec"].lora else lines
