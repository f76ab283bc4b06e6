"""Linear probe on a whole split: ridge regression whose memory is independent of its size.

The regression is that of few_shot.py. It depends on the examples only through the count and the
sum of features per class, and the covariance of all features. These are accumulated chunk by chunk,
each centered on its own mean and then shifted to the mean of all examples so far (Chan, Golub &
LeVeque 1983): one pass suffices, without cancellation for features far from zero. Standardized
features are orthogonal to the bias feature, so that the bias is solved separately.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from mixer_jax.evaluation.few_shot import BIAS_FEATURE, STD_EPS, LinearClassifier

# Regularization strengths to choose among.
L2_REGS = tuple(2.0**exponent for exponent in range(-10, 21, 2))


class SufficientStatistics:
    """Sufficient statistics of ridge regression, accumulated over examples."""

    def __init__(self, num_classes: int):
        self._counts = np.zeros(num_classes, np.int64)
        self._mean = np.zeros(0)
        # Scatter matrix about the mean, (d, d).
        self._scatter = np.zeros((0, 0))
        # Sum of the features of each class, (classes, d).
        self._class_sums = np.zeros((num_classes, 0))

    @property
    def count(self) -> int:
        """Number of examples added."""
        return int(self._counts.sum())

    def add(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> None:
        """Adds one or more examples."""
        features = features.astype(np.float64)
        if not self.count:
            dim = features.shape[1]
            self._mean, self._scatter = np.zeros(dim), np.zeros((dim, dim))
            self._class_sums = np.zeros((len(self._counts), dim))
        count, added = self.count, len(features)
        mean = features.mean(axis=0)
        centered, gap = features - mean, mean - self._mean
        self._scatter += centered.T @ centered
        self._scatter += np.outer(gap, gap) * (count * added / (count + added))
        self._mean += gap * (added / (count + added))
        np.add.at(self._class_sums, labels, features)
        self._counts += np.bincount(labels, minlength=len(self._counts))

    def solve(self) -> "RidgePath":
        """Solves the regression for every regularization strength."""
        std = np.sqrt(np.diag(self._scatter) / self.count) + STD_EPS
        eigenvalues, basis = np.linalg.eigh(self._scatter / np.outer(std, std))
        # Centered features sum to zero, so that only the differences of the ±1 targets count.
        products = 2 * (self._class_sums - self._counts[:, None] * self._mean).T
        return RidgePath(
            self._mean.copy(),
            std,
            np.maximum(eigenvalues, 0.0),
            basis,
            basis.T @ (products / std[:, None]),
            self.count,
            2.0 * self._counts - self.count,
        )


class RidgePath(NamedTuple):
    """Ridge regressions on the same examples, for any regularization strength.

    Attributes:
        mean: Mean of the features.
        std: Population standard deviation of the features, plus `STD_EPS`.
        eigenvalues: Eigenvalues of the Gram matrix of standardized features.
        basis: Eigenvectors, as columns.
        products: Products of standardized features and targets, in that basis.
        num_examples: Number of training examples.
        target_sums: Sums of the targets over the examples.
    """

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    eigenvalues: Float64[np.ndarray, " d"]
    basis: Float64[np.ndarray, "d d"]
    products: Float64[np.ndarray, "d classes"]
    num_examples: int
    target_sums: Float64[np.ndarray, " classes"]

    def classifier(self, l2_reg: float) -> LinearClassifier:
        """Returns the classifier for one regularization strength."""
        weights = self.basis @ (self.products / (self.eigenvalues + l2_reg)[:, None])
        weights = np.concatenate([weights, self._bias(l2_reg)[None]])
        return LinearClassifier(self.mean, self.std, weights)

    def count_correct(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        l2_regs: Sequence[float],
    ) -> Int[np.ndarray, " l2_regs"]:
        """Counts the correct predictions for each regularization strength."""
        # Rotated into the basis once; the regressions differ only in how they weigh its axes.
        rotated = ((features - self.mean) / self.std) @ self.basis
        counts = []
        for l2_reg in l2_regs:
            scores = (rotated / (self.eigenvalues + l2_reg)) @ self.products
            predictions = (scores + BIAS_FEATURE * self._bias(l2_reg)).argmax(axis=1)
            counts.append(int((predictions == labels).sum()))
        return np.array(counts)

    def _bias(self, l2_reg: float) -> Float64[np.ndarray, " classes"]:
        return BIAS_FEATURE * self.target_sums / (BIAS_FEATURE**2 * self.num_examples + l2_reg)
