"""Search for the batch size with the best throughput. Does not import JAX."""

from collections.abc import Callable
from typing import NamedTuple

# A larger batch must be faster by more than this factor to be worth its memory.
_MIN_GAIN = 1.02


class Trial(NamedTuple):
    """One batch size of a search; the rate is None if it does not fit or was not tried."""

    batch_size: int
    images_per_second: float | None


def search_batch_size(
    measure: Callable[[int], float | None], start: int
) -> tuple[int, list[Trial]]:
    """Finds the smallest batch size that twice its size beats by no more than 2 %.

    `measure` returns images/s, or None if a batch does not fit into memory or must not be tried.
    The first batch size, `start`, is doubled while it pays, and halved while it does not fit.

    Returns:
        The batch size, 0 if batch size 1 does not fit, and all trials in order.
    """
    size, rate = start, measure(start)
    trials = [Trial(size, rate)]
    while rate is None and size > 1:
        size //= 2
        rate = measure(size)
        trials.append(Trial(size, rate))
    if rate is None:
        return 0, trials
    while size >= start:
        larger = measure(2 * size)
        trials.append(Trial(2 * size, larger))
        if larger is None or larger <= _MIN_GAIN * rate:
            break
        size, rate = 2 * size, larger
    return size, trials
