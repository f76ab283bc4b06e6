"""Few-shot probes (the paper's Section 3): least squares from frozen features to targets of ±1.

All in float64 on the host. The constants are those of the authors' released evaluation
(big_vision, evaluators/fewshot_lsr.py and its configs).
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
# The value of the intercept's column: so large that the penalty hardly touches the intercept.
BIAS_FEATURE = 100.0
# Added to every deviation, so that a feature that never changes is no division by zero.
STD_EPS = 1e-5
# The label of an example that cannot be read.
UNUSABLE = -1


class LinearClassifier(NamedTuple):
    """A linear map from features to a score for each class.

    Attributes:
        mean: of the training features.
        deviation: likewise, population, plus `STD_EPS`.
        weights: of standardised features, and last of the intercept's column.
    """

    mean: Float64[np.ndarray, " d"]
    deviation: Float64[np.ndarray, " d"]
    weights: Float64[np.ndarray, "d_plus_1 classes"]

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n classes"]:
        """Returns a score for each class; the highest is the answer."""
        standardised = (features - self.mean) / self.deviation
        return standardised @ self.weights[:-1] + BIAS_FEATURE * self.weights[-1]


def fit_ridge(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    penalty: float = L2_REG,
) -> LinearClassifier:
    """Returns the ridge regression from standardised features to +1 for the class, −1 for others.

    Args:
        features: to learn from.
        labels: of the examples.
        num_classes: outputs.
        penalty: λ, on the squares of all weights, the intercept's too.
    """
    features = features.astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + STD_EPS
    ones = np.full((len(features), 1), BIAS_FEATURE)
    x = np.concatenate([(features - mean) / deviation, ones], axis=1)
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    return LinearClassifier(mean, deviation, solve_ridge(x, y, penalty))


def solve_ridge(
    x: Float64[np.ndarray, "n columns"], y: Float64[np.ndarray, "n outputs"], penalty: float
) -> Float64[np.ndarray, "columns outputs"]:
    """Returns the weights that minimise |x·weights − y|² + penalty·|weights|².

    Of the two forms of the solution, (xᵀx + λ)⁻¹xᵀy and xᵀ(xxᵀ + λ)⁻¹y, the one with the smaller
    matrix is solved.
    """
    n, columns = x.shape
    if columns <= n:
        return np.linalg.solve(x.T @ x + penalty * np.eye(columns), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(n), y)


class LazyLabels(Sequence[int]):
    """The label of every example of a source, read when it is first asked for, and kept.

    An example that cannot be read has the label `UNUSABLE`, as has one that was found unusable.
    """

    def __init__(self, source: Source, skip_bad: bool):
        """Takes the source.

        Args:
            source: of examples with one label each.
            skip_bad: whether examples that cannot be read are left out, or an error.
        """
        self._source, self._skip_bad = source, skip_bad
        self._known: dict[int, int] = {}
        # Places of examples that turned out unusable.
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: Any) -> Any:
        if place in self.bad:
            return UNUSABLE
        if place not in self._known:
            try:
                self._known[place] = self._source.examples[place]["labels"][0]
            except BadImageError as error:
                if not self._skip_bad:
                    bad = BadImage(error.name or f"example {place}", error.reason)
                    raise bad_images_error(self._source, [bad], 1) from error
                self.bad.add(place)
                return UNUSABLE
        return self._known[place]


def sample_few_shot(
    labels: Sequence[Any],  # Not of int: a type checker at run time would read some.
    class_names: tuple[str, ...],
    *,
    shots: int,
    seed: int,
    name: str,
) -> Int[np.ndarray, "shots classes"]:
    """Draws some examples of every class: a pure function of labels and seed.

    The first n rows are what would be drawn for n shots. Labels are read in a random order until
    every class has enough, so that of a large set only a part is read.

    Args:
        labels: of all examples; `UNUSABLE` for those that are not to be drawn.
        class_names: a name for each class.
        shots: examples of every class.
        seed: of the order.
        name: of the data set and split, for the error.

    Returns:
        The places of the examples.

    Raises:
        UserError: a class has fewer examples.
    """
    drawn: list[list[int]] = [[] for _ in class_names]
    missing = len(class_names)
    # Raw bits, sorted: of a generator's permutation NumPy does not promise that it stays the same.
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    for place in order.tolist():
        label = labels[place]
        if label == UNUSABLE or len(drawn[label]) == shots:
            continue
        drawn[label].append(place)
        missing -= len(drawn[label]) == shots
        if not missing:
            return np.array(drawn).T
    fewest = min(range(len(drawn)), key=lambda label: len(drawn[label]))
    count = len(drawn[fewest])
    fix = f"lower shots to {count}" if count else "learn from a split that has every class"
    raise UserError(
        f"{name}: class {class_names[fewest]!r} has {count} examples, fewer than {shots} shots; "
        f"{fix}"
    )
