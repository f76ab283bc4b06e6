"""Nearest neighbours on frozen features, weighted by their similarity (arXiv 1805.01978)."""

import numpy as np
from jaxtyping import Float, Float64, Int

NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
# Rows of the bank, and of what is asked, that are compared at a time.
_BANK_ROWS = 4096
_QUERY_ROWS = 512


class KnnClassifier:
    """The classes of the most similar examples: cosine similarity, weighed by its exponential."""

    def __init__(
        self,
        bank: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        num_classes: int,
        *,
        neighbours: int = NUM_NEIGHBORS,
        temperature: float = TEMPERATURE,
        bank_rows: int = _BANK_ROWS,
    ):
        """Takes the examples; the bank is kept as it is, and only parts of it made float64.

        Args:
            bank: features of the training examples.
            labels: of them.
            num_classes: outputs.
            neighbours: that have a say; fewer where there are not so many examples.
            temperature: the weight is exp(similarity / temperature).
            bank_rows: compared at a time; changes nothing but the memory it takes.
        """
        self._bank, self._labels, self._num_classes = bank, labels, num_classes
        self._neighbours = min(neighbours, len(bank))
        self._temperature, self._bank_rows = temperature, bank_rows

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n classes"]:
        """Returns each class's share of the weights of the nearest neighbours.

        The whole bank is gone through once a call, so that thousands are better asked together.
        """
        similarities, places = self._nearest(_normalize(features))
        # Relative to the nearest one, which changes no share.
        weights = np.exp((similarities - similarities[:, :1]) / self._temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        scores = np.zeros((len(features), self._num_classes))
        np.add.at(scores, (np.arange(len(places))[:, None], self._labels[places]), weights)
        return scores

    def _nearest(
        self, queries: Float64[np.ndarray, "n d"]
    ) -> tuple[Float64[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
        """Returns similarity and place of the nearest, the nearest first."""
        best = np.full((len(queries), self._neighbours), -np.inf)
        places = np.zeros(best.shape, np.int64)
        for start in range(0, len(self._bank), self._bank_rows):
            block = _normalize(self._bank[start : start + self._bank_rows])
            for first in range(0, len(queries), _QUERY_ROWS):
                rows = slice(first, first + _QUERY_ROWS)
                _keep_best(best[rows], places[rows], queries[rows] @ block.T, start)
        return best, places


def _keep_best(
    best: Float64[np.ndarray, "n k"],
    places: Int[np.ndarray, "n k"],
    found: Float64[np.ndarray, "n m"],
    start: int,
) -> None:
    """Puts what was found among the best, in place; the first of equals wins.

    Args:
        best: similarities, the largest first.
        places: theirs, all before `start`.
        found: similarities of places from `start` on.
        start: place of the first.
    """
    # After the first blocks hardly any is better than the worst kept.
    columns = np.flatnonzero((found > best[:, -1:]).any(axis=0))
    if not len(columns):
        return
    # Those from before stand first, as their places are lower: ties keep their order.
    values = np.concatenate([best, found[:, columns]], axis=1)
    numbers = np.broadcast_to(start + columns, (len(best), len(columns)))
    chosen = top_k(values, best.shape[1])
    best[:] = np.take_along_axis(values, chosen, axis=1)
    places[:] = np.take_along_axis(np.concatenate([places, numbers], axis=1), chosen, axis=1)


def top_k(values: Float64[np.ndarray, "n m"], count: int) -> Int[np.ndarray, "n count"]:
    """Returns where each row's largest values stand, from the largest; the first of equals wins."""
    chosen = np.sort(np.argpartition(-values, count - 1, axis=1)[:, :count], axis=1)
    kept = np.take_along_axis(values, chosen, axis=1)
    # Where more than fit are as large as the smallest kept, the choice among them was arbitrary.
    tied = (values >= kept.min(axis=1, keepdims=True)).sum(axis=1) > count
    if tied.any():
        order = np.argsort(-values[tied], axis=1, kind="stable")
        chosen[tied] = np.sort(order[:, :count], axis=1)
        kept = np.take_along_axis(values, chosen, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def _normalize(features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    features = features.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths == 0, 1.0, lengths)
