"""Calibration: does a probability of 0.8 mean eight of ten, and the temperature that mends it."""

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

LIMIT = 20.0  # temperatures lie between 1 / LIMIT and LIMIT
BINS = 10


def temperature(
    log_probability: Float64[np.ndarray, "slide classes"], labels: Int64[np.ndarray, " slide"]
) -> float:
    """The likeliest temperature, 1 being expected beforehand; only for validation slides.

    The logarithm of the temperature has a normal prior around 0 with a standard deviation of 1: few
    slides told apart without an error would else ask for a temperature of 0, and later ones be
    called far too surely. With hundreds of slides it makes no difference.

    Args:
        log_probability: Or logits, or any of these plus a constant for each slide.
        labels: Index of each slide's class.

    Returns:
        Above 1 where the head is too sure, between 0.05 and 20.

    Raises:
        ValueError: a number is not finite, or there is no slide.

    Source:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2. Ours: the prior.
    """
    if len(labels) == 0 or not np.isfinite(log_probability).all():
        raise ValueError(
            f"the logits of {len(labels)} validation slides are none or not finite: a temperature "
            "needs finite ones; use a smaller learning rate, or add validation slides"
        )

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(log_probability / np.exp(log_temperature), axis=1)
        return float(log_temperature**2 / 2 - scaled[np.arange(len(labels)), labels].sum())

    # The sum of two valleys may have two: the grid finds the deeper one.
    grid = np.linspace(-np.log(LIMIT), np.log(LIMIT), 61)
    at = int(np.argmin([loss(value) for value in grid]))
    bounds = (grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
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
