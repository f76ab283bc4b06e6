"""Classifiers of frozen features in closed form: ridge regression and k-nearest neighbors.

Everything is computed in float64 on the host. Ridge regression (the paper's Section 3) maps
features to targets of ±1; its constants are those of the authors' released evaluation (big_vision,
evaluators/fewshot_lsr.py and its configs). `fit_ridge` fits a few examples; `SufficientStatistics`
fits any number of them in chunks, with memory that is independent of their number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

L2_REG = 2.0**10
# Regularization strengths to choose among.
L2_REGS = tuple(2.0**exponent for exponent in range(-10, 21, 2))
# Value of the constant feature whose weight is the bias: so large that the bias is hardly
# regularized.
BIAS_FEATURE = 100.0
# Added to every standard deviation, because a feature may be constant.
STD_EPS = 1e-5

NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
# Rows of the bank and of the queries that are compared at a time.
_BANK_ROWS = 4096
_QUERY_ROWS = 512


class LinearClassifier(NamedTuple):
    """Linear map from features to one score per class.

    Attributes:
        mean: Mean of the training features.
        std: Population standard deviation of the training features, plus `STD_EPS`.
        weights: Weights of the standardized features, then of the bias feature.
    """

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    weights: Float64[np.ndarray, "d_plus_1 classes"]

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n classes"]:
        """Computes one score per class; the highest one is the prediction."""
        standardized = (features - self.mean) / self.std
        return standardized @ self.weights[:-1] + BIAS_FEATURE * self.weights[-1]


def fit_ridge(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    l2_reg: float = L2_REG,
) -> LinearClassifier:
    """Fits ridge regression from standardized features to +1 for the class and −1 for the others.

    `l2_reg` is λ, the factor of the squared weights, including the bias.
    """
    # In place, because the features of 10 images of each of 21,843 classes take 1.8 GB.
    x = np.full((len(features), features.shape[1] + 1), BIAS_FEATURE)
    standardized = x[:, :-1]
    standardized[:] = features
    mean, std = standardized.mean(axis=0), standardized.std(axis=0) + STD_EPS
    standardized -= mean
    standardized /= std
    return LinearClassifier(mean, std, solve_ridge(x, labels, num_classes, l2_reg))


def solve_ridge(
    x: Float64[np.ndarray, "n columns"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    l2_reg: float,
) -> Float64[np.ndarray, "columns classes"]:
    """Computes the weights that minimize |x·weights − y|² + l2_reg·|weights|².

    The targets y are +1 for the class and −1 for the others. The solution has two forms,
    (xᵀx + λ)⁻¹xᵀy and xᵀ(xxᵀ + λ)⁻¹y; the one with the smaller matrix is solved.
    """
    n, columns = x.shape
    if columns <= n:
        # xᵀy from the sums per class: y would take 38 GB for 10 images of each of 21,843 classes.
        products = np.zeros((num_classes, columns))
        np.add.at(products, labels, x)
        products *= 2
        products -= x.sum(axis=0)
        return np.linalg.solve(x.T @ x + l2_reg * np.eye(columns), products.T)
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    return x.T @ np.linalg.solve(x @ x.T + l2_reg * np.eye(n), y)


class SufficientStatistics:
    """Sufficient statistics of ridge regression, accumulated over examples.

    The regression depends on the examples only through the count and the sum of features per class,
    and the covariance of all features. These are accumulated chunk by chunk, each centered on its
    own mean and then shifted to the mean of all examples so far (Chan, Golub & LeVeque 1983): one
    pass suffices, without cancellation for features far from zero. Standardized features are
    orthogonal to the bias feature, so that the bias is solved separately.
    """

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


class KnnClassifier:
    """Vote of the most similar examples, weighted by the exponential of cosine similarity.

    See arXiv 1805.01978.
    """

    def __init__(
        self,
        bank: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        num_classes: int,
        *,
        num_neighbors: int = NUM_NEIGHBORS,
        temperature: float = TEMPERATURE,
        bank_rows: int = _BANK_ROWS,
    ):
        """Stores the training examples, without copying the bank.

        Args:
            bank: Features of the training examples.
            labels: Labels of the training examples.
            num_classes: Number of outputs.
            num_neighbors: Number of votes; fewer if there are fewer examples.
            temperature: Temperature of the weights, exp(similarity / temperature).
            bank_rows: Rows compared at a time, which affects memory only.
        """
        self._bank, self._labels, self._num_classes = bank, labels, num_classes
        self._num_neighbors = min(num_neighbors, len(bank))
        self._temperature, self._bank_rows = temperature, bank_rows

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n classes"]:
        """Computes each class's fraction of the votes.

        Every call reads the whole bank, so pass thousands of rows at a time.
        """
        similarities, indices = self._find_nearest(_normalize(features))
        # Relative to the nearest neighbor, which leaves the fractions unchanged.
        weights = np.exp((similarities - similarities[:, :1]) / self._temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        scores = np.zeros((len(features), self._num_classes))
        np.add.at(scores, (np.arange(len(indices))[:, None], self._labels[indices]), weights)
        return scores

    def _find_nearest(
        self, queries: Float64[np.ndarray, "n d"]
    ) -> tuple[Float64[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
        """Returns similarities and indices of the nearest neighbors, the nearest first."""
        best = np.full((len(queries), self._num_neighbors), -np.inf)
        indices = np.zeros(best.shape, np.int64)
        for start in range(0, len(self._bank), self._bank_rows):
            block = _normalize(self._bank[start : start + self._bank_rows])
            for query in range(0, len(queries), _QUERY_ROWS):
                rows = slice(query, query + _QUERY_ROWS)
                _merge_block(best[rows], indices[rows], queries[rows] @ block.T, start)
        return best, indices


def _merge_block(
    best: Float64[np.ndarray, "n k"],
    indices: Int[np.ndarray, "n k"],
    similarities: Float64[np.ndarray, "n m"],
    start: int,
) -> None:
    """Merges the similarities of a block that begins at `start` into the best ones, in place."""
    # After the first blocks hardly any candidate is better than the worst of the best.
    columns = np.flatnonzero((similarities > best[:, -1:]).any(axis=0))
    if not len(columns):
        return
    # Earlier examples come first, because their indices are lower: ties keep their order.
    values = np.concatenate([best, similarities[:, columns]], axis=1)
    block_indices = np.broadcast_to(start + columns, (len(best), len(columns)))
    top = top_k(values, best.shape[1])
    best[:] = np.take_along_axis(values, top, axis=1)
    indices[:] = np.take_along_axis(np.concatenate([indices, block_indices], axis=1), top, axis=1)


def top_k(values: Float64[np.ndarray, "n m"], k: int) -> Int[np.ndarray, "n k"]:
    """Returns the columns of each row's k largest values, in descending order; ties by column."""
    columns = np.sort(np.argpartition(-values, k - 1, axis=1)[:, :k], axis=1)
    top = np.take_along_axis(values, columns, axis=1)
    # If more than k values are at least as large as the smallest one, the choice was arbitrary.
    tied = (values >= top.min(axis=1, keepdims=True)).sum(axis=1) > k
    if tied.any():
        order = np.argsort(-values[tied], axis=1, kind="stable")
        columns[tied] = np.sort(order[:, :k], axis=1)
        top = np.take_along_axis(values, columns, axis=1)
    order = np.argsort(-top, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _normalize(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms == 0, 1.0, norms)
