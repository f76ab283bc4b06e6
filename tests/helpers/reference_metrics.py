"""Scores by their definitions, in float64."""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    return logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(1, keepdims=True))


def reference_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The definition: over bins, share of examples times |accuracy − mean confidence|."""
    bins = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    return sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean())
        for b in np.unique(bins)
    )
