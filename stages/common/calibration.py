"""Calibration: does a probability of 0.8 mean eight of ten, and the temperature that mends it."""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

LIMIT = 20.0  # temperatures lie between 1 / LIMIT and LIMIT: a few slides told apart want 0
BINS = 10


def temperature(
    log_probability: Float64[np.ndarray, "slide classes"], labels: Int64[np.ndarray, " slide"]
) -> float:
    """The temperature with the least mean negative log-likelihood; only for validation slides.

    Args:
        log_probability: Or logits, or any of these plus a constant for each slide.
        labels: Index of each slide's class.

    Returns:
        Above 1 where the head is too sure, between 0.05 and 20.

    Raises:
        ValueError: a number is not finite, or there is no slide.

    Source:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2.
    """
    if len(labels) == 0 or not np.isfinite(log_probability).all():
        raise ValueError(
            f"the logits of {len(labels)} validation slides are none or not finite: a temperature "
            "needs finite ones; use a smaller learning rate, or add validation slides"
        )

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(log_probability / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    # The loss is convex in 1 / temperature, so it has one valley on the logarithm too.
    bounds = (-np.log(LIMIT), np.log(LIMIT))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-9}).x))


def scaled(
    probability: Float64[np.ndarray, "*slide classes"], by: float
) -> Float64[np.ndarray, "*slide classes"]:
    """Probabilities after division of their logarithms by the temperature `by`."""
    return softmax(np.log(np.maximum(probability, np.finfo(np.float64).tiny)) / by, axis=-1)


def reliability(
    probability: Float64[np.ndarray, "slide classes"], labels: Int64[np.ndarray, " slide"]
) -> pd.DataFrame:
    """What was promised and what came true, in ten bins of equal width that have slides.

    For two classes the probability of class 1 against the share of class 1; for more that of the
    called class against the share called right.

    Returns:
        Columns predicted (mean), observed (share) and slides (count).
    """
    if probability.shape[1] == 2:
        promised, true = probability[:, 1], labels == 1
    else:
        promised, true = probability.max(1), probability.argmax(1) == labels
    rows = pd.DataFrame({"predicted": promised, "observed": true.astype(np.float64)})
    rows["bin"] = np.minimum((promised * BINS).astype(np.int64), BINS - 1)
    bins = rows.groupby("bin").agg(
        predicted=("predicted", "mean"), observed=("observed", "mean"), slides=("observed", "size")
    )
    return bins.reset_index(drop=True)


def expected_error(bins: pd.DataFrame) -> float:
    """Expected calibration error: the mean gap between promised and true, weighted by slides.

    Source:
        Naeini et al. 2015, https://doi.org/10.1609/aaai.v29i1.9602; ten bins.
    """
    gap = (bins.predicted - bins.observed).abs()
    return float(np.average(gap, weights=bins.slides))
