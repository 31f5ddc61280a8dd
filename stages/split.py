"""Stage 7, split: who trains, validates and tests, once for every encoder and head.

    reads   data/cohort; failed.csv of data/tile and data/embed
    writes  data/split/splits.csv    repeat, fold, slide_id, patient, label, split; one row a slide
                                     for each (repeat, fold)
            data/split/splits.json   protocol, digest of splits.csv, repeats, folds
            data/split/failed.csv    slides without a bag of every encoder, which are in no split

Run it with `dvc repro split`; its settings are the `split` section of params.yaml.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.common import cohort, failures, params, run, splits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitParams:
    """Section split of params.yaml."""

    protocol: Literal["holdout", "crossval", "paper_optimistic"]
    repeats: int  # of crossval: deals of the patients
    folds: int  # of crossval
    val_share: float  # of crossval: share of the patients outside of the fold that validate

    def __post_init__(self) -> None:
        """Reject splits without parts."""
        if self.repeats < 1:
            raise ValueError(f"split.repeats is {self.repeats}: it must be 1 or more")
        if self.folds < 2:
            raise ValueError(f"split.folds is {self.folds}: it must be 2 or more, 5 is usual")
        if not 0 < self.val_share < 1:
            raise ValueError(f"split.val_share is {self.val_share}: it must be above 0, below 1")


def main(
    source: Path = Path("data/cohort"),
    target: Path = Path("data/split"),
    settings_file: Path = Path("params.yaml"),
) -> None:
    """Split the cohort by the protocol and write it down.

    Raises:
        FileNotFoundError: the cohort stage has not run.
        ValueError: patients are too few, or a part lacks a class.
    """
    chosen = params.load(SplitParams, "split", settings_file)
    left_out = quarantined(source.parent, settings_file)
    rows = [row for row in cohort.read_rows(source) if row.slide_id not in left_out]
    if chosen.protocol == "crossval":
        seed = params.load(params.Top, path=settings_file).seed
        table = splits.crossval(rows, chosen.repeats, chosen.folds, chosen.val_share, seed)
    else:
        table = splits.holdout(rows, chosen.protocol == splits.OPTIMISTIC)
    parts = ("train", "test") if chosen.protocol == splits.OPTIMISTIC else cohort.SPLITS
    splits.check(table, parts, cohort.read_classes(source))
    splits.write(target, table, chosen.protocol)
    failures.write(target, left_out)
    logger.info("split: %s, %d splits", chosen.protocol, table.groupby(splits.KEYS).ngroups)
    if left_out:
        logger.warning("split: %d slides have no bag and are in no split", len(left_out))


def quarantined(data: Path, settings_file: Path) -> dict[str, str]:
    """Why slides have no bag of one encoder or another: all encoders are tested on the same."""
    encoders = params.section_of("embed", settings_file)["encoders"]
    places = {f"embed {name}": data / "embed" / name for name in reversed(encoders)}
    return {
        slide_id: f"{stage}: {error}"
        for stage, folder in {**places, "tile": data / "tile"}.items()
        for slide_id, error in failures.read(folder).items()
    }


if __name__ == "__main__":
    run.start(main)
