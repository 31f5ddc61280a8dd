"""The sanity row: logistic regression on the mean of a slide's instances."""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

ITERATIONS = 10_000  # far above need; not converging is an error

Bags = list[Float32[np.ndarray, "instance dim"]]
Labels = Int64[np.ndarray, " slide"]


@dataclass(frozen=True)
class Params:
    """Section evaluate.meanpool of params.yaml."""

    strengths: tuple[float, ...]  # candidates for scikit-learn's C (inverse L2 strength), no unit

    def __post_init__(self) -> None:
        """Reject strengths that scikit-learn cannot use."""
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(
                f"evaluate.meanpool.strengths is {list(self.strengths)}: give one or more numbers "
                "above 0"
            )


class MeanPool:
    """Mean, standardisation by the train slides, logistic regression; see `stages.heads.Head`."""

    def __init__(self, classes: int, params: Params) -> None:
        self.classes = classes
        self.params = params
        self.model: Pipeline | None = None

    def fit(
        self, bags_train: Bags, labels_train: Labels, bags_val: Bags, labels_val: Labels, seed: int
    ) -> None:
        """Keep the strength with the lowest validation log-loss; of equals the smallest C.

        Nothing here is random: `seed` is not used, and all seeds agree.
        """
        best = float("inf")
        for strength in sorted(self.params.strengths):
            model = _fitted(_pooled(bags_train), labels_train, strength)
            probability = model.predict_proba(_pooled(bags_val))
            loss = log_loss(labels_val, probability, labels=range(self.classes))
            if loss < best:
                best, self.model = loss, model

    def predict(
        self, bags: Bags
    ) -> tuple[Float64[np.ndarray, "slide classes"], list[Float64[np.ndarray, " instance"]]]:
        """Probabilities, and equal attention on every instance."""
        if self.model is None:
            raise ValueError("meanpool has not been fitted: call fit before predict")
        attention = [np.full(len(bag), 1 / len(bag)) for bag in bags]
        return self.model.predict_proba(_pooled(bags)), attention


def build(dim: int, classes: int, params: Params) -> MeanPool:
    """An unfitted mean-pooling head; it needs no `dim`."""
    return MeanPool(classes, params)


def _pooled(bags: Bags) -> Float64[np.ndarray, "slide dim"]:
    return np.stack([bag.mean(axis=0, dtype=np.float64) for bag in bags])


def _fitted(pooled: Float64[np.ndarray, "slide dim"], labels: Labels, strength: float) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(pooled, labels)
        except ConvergenceWarning:
            raise ValueError(
                f"logistic regression with C = {strength} did not converge in {ITERATIONS} steps: "
                "remove it from evaluate.meanpool.strengths"
            ) from None
