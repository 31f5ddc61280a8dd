"""Stage 0, index: what DVC cannot see by itself: slides, detector, and weights to begin with.

    reads   the folder that the cohort's source takes its slides from, when it takes them from one
            the weights of the detector that `detect.detector` names
            the files that `pretrain.weights` and `pretrain.init_from` name
            those of the encoders that `fetch.encoders` names
    writes  data/index/slides.csv      its files by name, length, time and whether
                                       they may be read; folders that may not
            data/index/detector.json   the detector, its libraries' versions, its weights' digest
            data/index/weights.json    what pretraining begins with, by digest
            data/index/encoders/<name>.json   each encoder from elsewhere, by digest

It runs at every `dvc repro`, in a fraction of a second, so that DVC sees a slide that was added,
removed or replaced without reading terabytes, and weights or a library that changed: weights are
read again only when their length or time did. It finds wrong names in params.yaml too, and missing
weights, before the stage that would stumble over them has cost its predecessors' time. On a machine
where the folder, or the detector's weights or library, is not, as after a `dvc pull`, what was
written of them stays. Which device the detector runs on is not looked at: that takes seconds.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from stages.common import cohort, digests, failures, params, plugins, run, walk

logger = logging.getLogger(__name__)


ENCODERS = ("pretrained", "untrained")  # what pretrain leaves in data/pretrain
OCCUPIED = (*ENCODERS, "dvclive")  # in data/pretrain
NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"  # a folder, and a key of params.yaml
BEGINNINGS = ("weights", "init_from")  # keys of pretrain
NO_FILE = ("", "none", "timm")


def main(target: Path = Path("data/index")) -> None:
    """Check the names in params.yaml, list the folder's files and identify the detector.

    Raises:
        FileNotFoundError: the detector's weights are missing, or those to begin with.
        ImportError: the detector's library is missing.
        ValueError: params.yaml names a plug-in or encoder that does not exist.
    """
    _check_names()
    _list_slides(target / "slides.csv")
    _identify_detector(target / "detector.json")
    _identify_weights(target / "weights.json")
    _identify_encoders(target / "encoders")


def _list_slides(target: Path) -> None:
    lines = ["path,bytes,mtime_ns,readable"]
    settings = params.section_of(f"cohort.{params.section_of('cohort')['source']}")
    if isinstance(settings.get("slides"), str):  # a folder; a source that draws has a number there
        folder = cohort.locate(settings["slides"])
        labels = cohort.locate(str(settings.get("labels")))
        if not os.path.isdir(folder) and target.is_file():
            logger.info("index: no folder %s here, its list is kept", folder)
            return
        files, closed = walk.below(folder)
        lines += [_line(file, str(file.relative_to(folder))) for file in files]
        lines += [f"{_quoted(str(place.relative_to(folder)))},,,0" for place in closed]
        lines += [_line(labels, "labels")] if os.path.isfile(labels) else []
    with run.atomic(target) as temporary:
        text = "\n".join(lines) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def _identify_detector(target: Path) -> None:
    name = params.section_of("detect")["detector"]
    plugin = plugins.load("detectors", name)
    own = params.load(plugin.Params, f"detect.{name}")
    found = {"detector": name, "weights": str(getattr(own, "weights", ""))}
    try:
        found["version"] = plugin.identity(own)
    except (FileNotFoundError, ImportError):
        before = _written(target)
        if any(before.get(key) != value for key, value in found.items()):
            raise
        logger.info("index: no weights or library of %s here, its version is kept", name)
        return
    _write(target, found)


def _identify_weights(target: Path) -> None:
    """Digest what pretraining begins with."""
    settings = params.section_of("pretrain")
    before = _written(target)
    found = {
        key: _identified(f"pretrain.{key}", str(settings.get(key) or ""), before.get(key, {}))
        for key in BEGINNINGS
    }
    _write(target, found)


def _identify_encoders(target: Path) -> None:
    """Digest what each entry of `fetch.encoders` names."""
    entries = params.section_of("fetch.encoders")
    for name, entry in entries.items():
        file = target / f"{name}.json"
        key, place = f"fetch.encoders.{name}", entry
        if isinstance(entry, dict):
            key, place = f"{key}.weights", params.section_of(key).get("weights", "")
        _write(file, _identified(key, str(place), _written(file)))
    for file in target.glob("*.json"):
        if file.stem not in entries:
            file.unlink()


def _identified(key: str, name: str, known: dict[str, str]) -> dict[str, str]:
    """The file or folder that a param names, by digest; of an absent one what is `known` stays."""
    place = cohort.locate(name)
    files = [] if name in NO_FILE else walk.below(place)[0] if place.is_dir() else [place]
    if all(file.is_file() for file in files):
        return {"name": name, "digest": digests.digest_of(files) if files else ""}
    if known.get("name") == name:
        logger.info("index: no %s here, its digest is kept", name)
        return known
    other = ", or set it to none or timm" if key.endswith("weights") else ""
    raise FileNotFoundError(f"{key} is {name}, and there is no such file: mend the path{other}")


def _written(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _write(file: Path, found: dict[str, Any]) -> None:
    with run.atomic(file) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _check_names() -> None:
    """Find a wrong name now, not when its stage begins."""
    params.load(params.Top)
    params.load(failures.FailureParams)
    heads, encoders = (
        params.section_of(section)[key]
        for section, key in (("evaluate", "heads"), ("embed", "encoders"))
    )
    for place, names in (("evaluate.heads", heads), ("embed.encoders", encoders)):
        if not names:
            raise ValueError(f"params.yaml: {place} is {names}: name one or more")
    fetched = params.section_of("fetch.encoders")
    for name in fetched:
        if not re.fullmatch(NAME, str(name)) or name in OCCUPIED:
            raise ValueError(
                f"params.yaml: fetch.encoders names an encoder {name!r}: begin with a letter or "
                f"digit, go on with letters, digits, _ and -, and take none of {_list(OCCUPIED)}"
            )
    for name in encoders:
        if name not in (*ENCODERS, *fetched):
            raise ValueError(
                f"params.yaml: embed.encoders names {name!r}: choose of "
                f"{_list((*ENCODERS, *fetched))}, or describe it in fetch.encoders"
            )
    plugins.check("sources", params.section_of("cohort")["source"])
    plugins.check("detectors", params.section_of("detect")["detector"])
    plugins.check("methods", params.section_of("pretrain")["method"])
    for name in heads:
        plugins.check("heads", name)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _line(file: Path, name: str) -> str:
    status, readable = file.stat(), int(os.access(file, os.R_OK))
    return f"{_quoted(name)},{status.st_size},{status.st_mtime_ns},{readable}"


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


if __name__ == "__main__":
    run.start(main)
