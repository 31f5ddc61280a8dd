"""Stage 10, report: one HTML page with what every stage made and how the encoders compare.

    reads   data/*                  metrics, pictures and predictions of the stages before
    writes  data/report/index.html  self-contained: pictures inside, nothing from the network

Run it with `dvc repro report`. Slides shown are the first of each class by id: nobody chose them
for their looks.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from stages.common import (
    cell_figures,
    cohort,
    failures,
    figures,
    nuclei_figures,
    outliers,
    params,
    run,
    stores,
    tile_figures,
)
from stages.common.cohort import SlideRow

logger = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
COUNTED = (
    "cohort",
    "tile",
    "detect",
    "perturb",
    "pretrain",
)  # stages whose metrics.json holds counts
SLIDES_PER_CLASS = 3  # in the gallery of thumbnails
PATCHES = 6  # with the highest, and as many with the lowest attention of a slide


def main(
    data: Path = Path("data"),
    target: Path = Path("data/report"),
    settings_file: Path = Path("params.yaml"),
) -> None:
    """Collect, draw and write the page.

    Raises:
        FileNotFoundError: something is missing; the message names the stage that makes it.
    """
    page = {"settings": _tracked(settings_file), **collect(data, settings_file)}
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    text = environment.get_template(TEMPLATE).render(page)
    with run.atomic(target / "index.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    logger.info("report: %s, %.1f MB", target / "index.html", len(text) / 1e6)


def collect(data: Path, settings_file: Path) -> dict[str, Any]:
    """Everything on the page that comes from the stages."""
    rows, classes = cohort.read_rows(data / "cohort"), cohort.read_classes(data / "cohort")
    left_out = quarantined(data)
    whole = [row for row in rows if row.slide_id not in left_out]
    of_class = {label: [row for row in whole if row.label == label] for label in classes[::-1]}
    shown = [row for found in of_class.values() for row in found[:SLIDES_PER_CLASS]]
    firsts = [row for found in of_class.values() for row in found[:1]]
    cells = read_cells(data / "evaluate", settings_file)
    pretrain = data / "pretrain"
    return {
        "counts": {stage: _flat(_read_json(data / stage, stage)) for stage in COUNTED},
        "quarantined": left_out,
        "of_slides": len(rows) + len(failures.read(data / "cohort")),
        "outliers": outliers.read(data / "cohort"),
        "cells": cells,
        "positive": classes[-1],
        "evaluation": cell_figures.section(data, cells),
        "curves": training_curves(pretrain / "dvclive" / "plots" / "metrics"),
        "slides": shown,
        "tiling": tile_figures.section(data / "tile", [row.slide_id for row in shown]),
        "detection": nuclei_figures.section(data / "detect"),
        "nuclei": _gallery(data, firsts, "detect", "overlay.jpg", 960),
        "perturbed": _gallery(data, firsts, "perturb", "examples.jpg", 960),
        "views": figures.picture(_need(pretrain / "views.png", "pretrain"), 1200),
        "attention": attention_rows(data, cells, of_class),
    }


def quarantined(data: Path) -> dict[str, str]:
    """Why slides are missing from training or evaluation, by their ids."""
    training = {
        slide_id: f"Not trained on. {stage}: {error}"
        for stage in ("perturb", "detect")
        for slide_id, error in failures.read(data / stage).items()
    }
    evaluation = {
        slide_id: f"Not {'trained on or ' * error.startswith('tile')}evaluated. {error}"
        for slide_id, error in failures.read(data / "split").items()
    }
    unread = {
        slide_id: f"Not in the cohort. {error}"
        for slide_id, error in failures.read(data / "cohort").items()
    }
    both = {name: f"{training[name]} {evaluation[name]}" for name in training.keys() & evaluation}
    return dict(sorted({**training, **evaluation, **both, **unread}.items()))


def read_cells(folder: Path, settings_file: Path) -> list[dict[str, Any]]:
    """What evaluate wrote for each encoder and head that params.yaml names, in that order."""
    encoders, heads = (
        params.section_of(section, settings_file)[key]
        for section, key in (("embed", "encoders"), ("evaluate", "heads"))
    )
    return [_read_cell(folder, encoder, head) for encoder in encoders for head in heads]


def _read_cell(folder: Path, encoder: str, head: str) -> dict[str, Any]:
    place = folder / encoder / head
    predictions = _read_parquet(place / "predictions.parquet")
    return {
        "encoder": encoder,
        "head": head,
        "metrics": json.loads(_need(place / "metrics.json", "evaluate").read_text("utf-8")),
        "predictions": predictions[predictions.split == "test"],
        "attention": _first_attention(_read_parquet(place / "attention.parquet")),
    }


def _first_attention(table: pd.DataFrame) -> pd.DataFrame:
    """Of repeated splits the first in which a slide is a test slide."""
    firsts = table.drop_duplicates("slide_id")[["slide_id", "repeat", "fold"]]
    return table.merge(firsts, on=["slide_id", "repeat", "fold"])


def attention_rows(
    data: Path, cells: list[dict[str, Any]], of_class: dict[str, list[SlideRow]]
) -> list[dict[str, Any]]:
    """For the first test slide of each class, the patches that each encoder's head looked at.

    Of an encoder's heads the first that weighs patches unequally is taken.
    """
    uneven = [cell for cell in cells if _is_uneven(cell["attention"])]
    firsts = {cell["encoder"]: cell for cell in reversed(uneven)}
    scored = {slide_id for cell in cells for slide_id in cell["predictions"].slide_id}
    tests = [[row for row in rows if row.slide_id in scored] for rows in of_class.values()]
    return [
        {"encoder": encoder, "head": cell["head"], **_looked_at(data, cell, found[0])}
        for found in tests
        if found
        for encoder, cell in sorted(firsts.items())
    ]


def _is_uneven(attention: pd.DataFrame) -> bool:
    return bool((attention.groupby("slide_id").attention.agg(np.ptp) > 1e-9).any())


def _looked_at(data: Path, cell: dict[str, Any], row: SlideRow) -> dict[str, Any]:
    mine = cell["attention"][cell["attention"].slide_id == row.slide_id]
    ranked = mine.sort_values(["attention", "patch"], ascending=[False, True])
    count = min(PATCHES, len(ranked) // 2)
    store = stores.open_patches(_need(data / "tile" / row.slide_id / "patches.zarr", "tile"))

    def pictures(chosen: pd.DataFrame) -> list[dict[str, Any]]:
        return [
            {
                "source": figures.encode(Image.fromarray(store[int(patch)]), 128),
                "patch": patch,
                "times": weight * len(ranked),  # 1: as if all patches counted alike
            }
            for patch, weight in zip(chosen.patch, chosen.attention, strict=True)
        ]

    predicted = cell["predictions"][cell["predictions"].slide_id == row.slide_id]
    return {
        "row": row,
        "probability": predicted[_last_class(predicted)].mean(),
        "high": pictures(ranked[:count]),
        "low": pictures(ranked[len(ranked) - count :]),
    }


def _last_class(predictions: pd.DataFrame) -> str:
    """The column of the last class, which of two is the positive one."""
    return [name for name in predictions if name.startswith("probability_")][-1]


def training_curves(folder: Path) -> list[tuple[str, Markup]]:
    """Name and plot of each curve that DVCLive wrote; none if training kept none."""
    files = sorted(folder.rglob("*.tsv"))
    return [
        (
            file.relative_to(folder).with_suffix("").as_posix(),
            figures.line(pd.read_csv(file, sep="\t"), f"curve{at}"),
        )
        for at, file in enumerate(files)
    ]


def _gallery(
    data: Path, rows: list[SlideRow], stage: str, name: str, width_px: int
) -> list[dict[str, Any]]:
    files = [_need(data / stage / row.slide_id / name, stage) for row in rows]
    return [
        {"row": row, "source": figures.picture(file, width_px)}
        for row, file in zip(rows, files, strict=True)
    ]


def _need(path: Path, stage: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `dvc repro {stage}`")
    return path


def _read_json(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads(_need(folder / "metrics.json", stage).read_text(encoding="utf-8"))


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(_need(path, "evaluate"))


def _tracked(settings_file: Path) -> dict[str, dict[str, Any]]:
    """The settings by section, the top level under ""; without `engine`, which decides nothing."""
    values = params.section_of("", settings_file)
    sections = {name: _flat(value) for name, value in values.items() if isinstance(value, dict)}
    sections.pop("engine", None)
    return {"": {k: v for k, v in values.items() if not isinstance(v, dict)}, **sections}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


if __name__ == "__main__":
    run.start(main)
