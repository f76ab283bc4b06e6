"""k-nearest-neighbor classifier on frozen features, weighted by similarity (arXiv 1805.01978)."""

import numpy as np
from jaxtyping import Float, Float64, Int

NUM_NEIGHBORS = 20
TEMPERATURE = 0.07
# Rows of the bank and of the queries that are compared at a time.
_BANK_ROWS = 4096
_QUERY_ROWS = 512


class KnnClassifier:
    """Vote of the most similar examples, weighted by the exponential of cosine similarity."""

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
        """Stores the training examples. The bank is not copied.

        Args:
            bank: Features of the training examples.
            labels: Labels of the training examples.
            num_classes: Number of outputs.
            num_neighbors: Number of votes; fewer if there are fewer examples.
            temperature: Temperature of the weights, exp(similarity / temperature).
            bank_rows: Rows that are converted to float64 and compared at a time. It affects memory
                only.
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
    """Merges the similarities of a block into the best ones, in place; ties go to the first.

    Args:
        best: Largest similarities so far, in descending order.
        indices: Indices of `best`, all before `start`.
        similarities: Similarities of the examples from `start` on.
        start: Index of the first example of the block.
    """
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
