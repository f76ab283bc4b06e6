"""A linear probe on a whole split: least squares whose memory does not grow with the examples.

The regression is that of few_shot.py. Of the examples it needs only the number and the sum of the
features of each class, and the covariances of all features. These are gathered chunk by chunk, each
about its own mean and then moved to the mean of all seen so far (Chan, Golub & LeVeque 1983): one
pass will do, and nothing is lost to cancellation, however far the features lie from zero.
Standardised features are orthogonal to the intercept's column, so it is solved by itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from mixer_jax.evaluation.few_shot import BIAS_FEATURE, STD_EPS, LinearClassifier

# Penalties to choose among.
L2_REGS = tuple(2.0**exponent for exponent in range(-10, 21, 2))


class SufficientStatistics:
    """What least squares need to know of examples seen so far."""

    def __init__(self, num_classes: int):
        self._counts = np.zeros(num_classes, np.int64)
        self._mean = np.zeros(0)
        # Of products of deviations from the mean, (d, d).
        self._scatter = np.zeros((0, 0))
        # Of the features of each class, (classes, d).
        self._class_sums = np.zeros((num_classes, 0))

    @property
    def count(self) -> int:
        """How many examples were added."""
        return int(self._counts.sum())

    def add(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> None:
        """Adds some examples, one or more."""
        features = features.astype(np.float64)
        if not self.count:
            width = features.shape[1]
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
            self._class_sums = np.zeros((len(self._counts), width))
        before, added = self.count, len(features)
        mean = features.mean(axis=0)
        centred, gap = features - mean, mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(gap, gap) * (before * added / (before + added))
        self._mean += gap * (added / (before + added))
        np.add.at(self._class_sums, labels, features)
        self._counts += np.bincount(labels, minlength=len(self._counts))

    def solve(self) -> "RidgePath":
        """Returns the regressions on these examples, for every penalty."""
        deviation = np.sqrt(np.diag(self._scatter) / self.count) + STD_EPS
        values, basis = np.linalg.eigh(self._scatter / np.outer(deviation, deviation))
        # Centred features sum to zero, so that of targets of ±1 only the differences count.
        products = 2 * (self._class_sums - self._counts[:, None] * self._mean).T
        return RidgePath(
            self._mean.copy(),
            deviation,
            np.maximum(values, 0.0),
            basis,
            basis.T @ (products / deviation[:, None]),
            self.count,
            2.0 * self._counts - self.count,
        )


class RidgePath(NamedTuple):
    """The ridge regressions on the same examples, by penalty.

    Attributes:
        mean: of the features.
        deviation: likewise, population, plus `STD_EPS`.
        values: eigenvalues of the products of standardised features.
        basis: eigenvectors, one a column.
        products: of standardised features and targets, in that basis.
        num_examples: that were learnt from.
        target_sums: over the examples.
    """

    mean: Float64[np.ndarray, " d"]
    deviation: Float64[np.ndarray, " d"]
    values: Float64[np.ndarray, " d"]
    basis: Float64[np.ndarray, "d d"]
    products: Float64[np.ndarray, "d classes"]
    num_examples: int
    target_sums: Float64[np.ndarray, " classes"]

    def at(self, penalty: float) -> LinearClassifier:
        """Returns the regression with one penalty."""
        weights = self.basis @ (self.products / (self.values + penalty)[:, None])
        weights = np.concatenate([weights, self._intercept(penalty)[None]])
        return LinearClassifier(self.mean, self.deviation, weights)

    def count_correct(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        penalties: Sequence[float],
    ) -> Int[np.ndarray, " penalties"]:
        """Returns how many of some examples the regression with each penalty gets right."""
        # Turned into the basis once; the regressions differ in how they weigh its axes.
        turned = ((features - self.mean) / self.deviation) @ self.basis
        right = []
        for penalty in penalties:
            scores = (turned / (self.values + penalty)) @ self.products
            answers = (scores + BIAS_FEATURE * self._intercept(penalty)).argmax(axis=1)
            right.append(int((answers == labels).sum()))
        return np.array(right)

    def _intercept(self, penalty: float) -> Float64[np.ndarray, " classes"]:
        return BIAS_FEATURE * self.target_sums / (BIAS_FEATURE**2 * self.num_examples + penalty)
