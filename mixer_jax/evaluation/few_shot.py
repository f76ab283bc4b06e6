"""Few-shot probes (the paper's Section 3): ridge regression from features to targets of ±1.

Everything is computed in float64 on the host. The constants are those of the authors' released
evaluation (big_vision, evaluators/fewshot_lsr.py and its configs).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import bad_images_error

L2_REG = 2.0**10
# Value of the constant feature whose weight is the bias: so large that the bias is hardly
# regularized.
BIAS_FEATURE = 100.0
# Added to every standard deviation, because a feature may be constant.
STD_EPS = 1e-5
# Label of an unusable example.
UNUSABLE = -1


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

    Args:
        features: Training features.
        labels: Labels of the examples.
        num_classes: Number of outputs.
        l2_reg: λ, the factor of the squared weights, including the bias.
    """
    features = features.astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + STD_EPS
    bias = np.full((len(features), 1), BIAS_FEATURE)
    x = np.concatenate([(features - mean) / std, bias], axis=1)
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    return LinearClassifier(mean, std, solve_ridge(x, y, l2_reg))


def solve_ridge(
    x: Float64[np.ndarray, "n columns"], y: Float64[np.ndarray, "n outputs"], l2_reg: float
) -> Float64[np.ndarray, "columns outputs"]:
    """Computes the weights that minimize |x·weights − y|² + l2_reg·|weights|².

    The solution has two forms, (xᵀx + λ)⁻¹xᵀy and xᵀ(xxᵀ + λ)⁻¹y; the one with the smaller matrix
    is solved.
    """
    n, columns = x.shape
    if columns <= n:
        return np.linalg.solve(x.T @ x + l2_reg * np.eye(columns), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + l2_reg * np.eye(n), y)


class LazyLabels(Sequence[int]):
    """Labels of the examples of a source, read on first use and cached.

    An example that cannot be read, or that was found unusable, has the label `UNUSABLE`.
    """

    def __init__(self, source: Source, skip_bad: bool):
        """Initializes an empty cache.

        Args:
            source: Examples with one label each.
            skip_bad: Whether unreadable examples are skipped; otherwise they are an error.
        """
        self._source, self._skip_bad = source, skip_bad
        self._labels: dict[int, int] = {}
        # Indices of examples found unusable.
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if index in self.bad:
            return UNUSABLE
        if index not in self._labels:
            try:
                self._labels[index] = self._source.examples[index]["labels"][0]
            except BadImageError as error:
                if not self._skip_bad:
                    bad = BadImage(error.name or f"example {index}", error.reason)
                    raise bad_images_error(self._source, [bad], 1) from error
                self.bad.add(index)
                return UNUSABLE
        return self._labels[index]


def sample_few_shot(
    labels: Sequence[Any],  # Not Sequence[int]: a runtime type checker would read an element.
    class_names: tuple[str, ...],
    *,
    shots: int,
    seed: int,
    name: str,
) -> Int[np.ndarray, "shots classes"]:
    """Samples examples of every class; a pure function of labels and seed.

    The first n rows are the sample for n shots. Labels are read in a random order until every class
    has enough, so that only a part of a large dataset is read.

    Args:
        labels: Labels of all examples; `UNUSABLE` excludes an example.
        class_names: Name of each class.
        shots: Examples per class.
        seed: Seed of the order.
        name: Dataset and split, for the error.

    Returns:
        Indices of the examples.

    Raises:
        UserError: Some class has too few examples.
    """
    sampled: list[list[int]] = [[] for _ in class_names]
    num_incomplete = len(class_names)
    # Sorted raw bits, because NumPy does not promise that a generator's permutation is stable.
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    for index in order.tolist():
        label = labels[index]
        if label == UNUSABLE or len(sampled[label]) == shots:
            continue
        sampled[label].append(index)
        num_incomplete -= len(sampled[label]) == shots
        if not num_incomplete:
            return np.array(sampled).T
    fewest = min(range(len(sampled)), key=lambda label: len(sampled[label]))
    count = len(sampled[fewest])
    fix = f"Lower shots to {count}" if count else "Train on a split that contains every class"
    raise UserError(
        f"{name}: shots must not exceed the examples of any class, got {shots} shots and {count} "
        f"examples of class {class_names[fewest]!r}. {fix}."
    )
