"""What `stages.evaluate` asks of a head: `build(dim, classes, params)` returns one of these."""

from typing import Protocol

import numpy as np
from jaxtyping import Float32, Float64, Int64


class Head(Protocol):
    """Turns the bag of a slide into class probabilities."""

    def fit(
        self,
        bags_train: list[Float32[np.ndarray, "instance dim"]],
        labels_train: Int64[np.ndarray, " slide"],
        bags_val: list[Float32[np.ndarray, "instance dim"]],
        labels_val: Int64[np.ndarray, " val_slide"],
        seed: int,
    ) -> None:
        """Learn from the train bags; choose epoch and strength on the validation bags only."""
        ...

    def predict(
        self, bags: list[Float32[np.ndarray, "instance dim"]]
    ) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
        """Probabilities that sum to 1, and per bag the attention, summing to 1."""
        ...
