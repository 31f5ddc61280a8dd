"""Where the cohort's slides come from: one file a source."""

from pathlib import Path
from typing import Any, Protocol

from stages.common.cohort import SlideRow


class Source(Protocol):
    """What a file of this folder offers, beside its `Params`."""

    def build(self, params: Any, seed: int, target: Path) -> list[SlideRow]:
        """List the slides, with label and patient, and with split and mpp where they are given.

        Args:
            params: The section `cohort.<source>` of params.yaml.
            seed: Of everything drawn at random.
            target: `data/cohort`; a source that makes slides puts them there.
        """
        ...
