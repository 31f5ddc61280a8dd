"""Watching a pretraining run: its settings, and the alarm when its embeddings collapse."""

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)

ONE_WAY = 0.01  # embedding_std below which all patches look alike
UNIFORM = 0.99999  # teacher_entropy above which the outputs say nothing
ONE_PROTOTYPE = 0.01  # prototypes_entropy below which all patches fall on one
# Difference of positive and negative cosine below which a patch's views are as any others. Before
# anything is learned it is small too, of either sign: 0.01 to 0.04 with small batches.
ALIKE = 0.005


@dataclass(frozen=True)
class WatchParams:
    """Section pretrain.watch of params.yaml; nothing in it changes the weights."""

    probe_epochs: int  # epochs between two probes of the embeddings; 0: none
    probe_patches: int  # most patches that a probe embeds
    neighbours: int  # that vote on a patch (DINO 20)
    # Share of the run from which a collapse stops it; 1: it never does. From the end of the warm-up
    # to there it is warned of.
    collapse_after: float
    collapse_rows: int  # rows of the curves in a row that must show it

    def __post_init__(self) -> None:
        """Refuse values with which nothing could be seen."""
        for name in ("probe_patches", "neighbours", "collapse_rows"):
            if getattr(self, name) < 1:
                found = getattr(self, name)
                raise ValueError(
                    f"params.yaml: pretrain.watch.{name} is {found}: it must be 1 or more"
                )
        if self.probe_epochs < 0 or not 0 <= self.collapse_after <= 1:
            raise ValueError(
                f"params.yaml: pretrain.watch.probe_epochs is {self.probe_epochs}, collapse_after "
                f"{self.collapse_after}: they must be 0 or more, and from 0 to 1"
            )

    def due(self, step: int, every: int, per_epoch: int) -> bool:
        """Whether a probe is due at step `step`, rows being `every` steps apart."""
        if not self.probe_epochs:
            return False
        stride = per_epoch * self.probe_epochs
        return step // stride > max(step - every, 0) // stride


class Alarm:
    """Warns of a collapse after the warm-up, each kind once, and later stops the run.

    Args:
        settings: How long it waits.
        warmup: Share of the run in which the learning rate rises, and nothing is learned yet.
    """

    def __init__(self, settings: WatchParams, warmup: float) -> None:
        self.settings, self.warmup = settings, warmup
        self._told: set[str] = set()

    def look(self, rows: list[dict[str, float]], progress: float) -> None:
        """Compare the newest rows with each kind of collapse.

        Raises:
            ValueError: they all show one, and `collapse_after` is over; it says what was seen,
                what is healthy, and what to change.
        """
        settings = self.settings
        last = rows[-settings.collapse_rows :]
        if progress < self.warmup or len(last) < settings.collapse_rows:
            return
        if "embedding_std" not in last[-1]:
            self._tell(
                "unseen",
                "a step of one patch does not show whether embeddings collapse: raise "
                "pretrain.batch",
            )
        for name, numbers, bad, what in _SIGNS:
            if all(numbers <= row.keys() and bad(row) for row in last):
                seen = ", ".join(
                    f"{number} is {last[-1][number]:.4g}" for number in sorted(numbers)
                )
                text = f"{seen} at step {last[-1]['step']:.0f} and in the {len(last)} rows up to it"
                if progress >= settings.collapse_after:
                    raise ValueError(
                        f"pretraining collapsed: {text}: {what}. Checkpoints and curves are kept; "
                        "pretrain.watch.collapse_after 1 would let it go on"
                    )
                self._tell(name, f"pretraining may have collapsed: {text}: {what}")

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            logger.warning("%s", text)
        self._told.add(kind)


_SIGNS = (
    (
        "one way",
        {"embedding_std"},
        lambda row: row["embedding_std"] < ONE_WAY,
        "every patch has the same embedding (healthy: 0.2 to 1). Lower pretrain.learning_rate, "
        "raise pretrain.batch, or raise the method's momentum",
    ),
    (
        "uniform",
        {"teacher_entropy"},
        lambda row: row["teacher_entropy"] > UNIFORM,
        "the teacher's outputs are uniform, the loss stays at ln(prototypes). Lower "
        "pretrain.dino.teacher_temperature, or pretrain.dino.prototypes",
    ),
    (
        "one prototype",
        {"prototypes_entropy"},
        lambda row: row["prototypes_entropy"] < ONE_PROTOTYPE,
        "all patches fall on one prototype (healthy: 0.3 to 1). Raise "
        "pretrain.dino.teacher_temperature, or lower pretrain.dino.center_momentum",
    ),
    (
        "alike",
        {"positive_cosine", "negative_cosine"},
        lambda row: abs(row["positive_cosine"] - row["negative_cosine"]) < ALIKE,
        "two views of a patch are as alike as views of two patches (healthy: far more). Lower "
        "pretrain.learning_rate, raise pretrain.batch, or raise the method's momentum",
    ),
)
