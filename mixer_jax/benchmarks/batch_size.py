"""How large a batch is fast: searched by doubling."""

from collections.abc import Callable
from typing import NamedTuple

# A larger batch must be faster by more than this to be worth its memory.
_LEAST_GAIN = 1.02


class Tried(NamedTuple):
    """A batch size that was tried.

    Attributes:
        batch_size: images.
        images_per_second: at it; None: it did not fit.
    """

    batch_size: int
    images_per_second: float | None


def search(rate_of: Callable[[int], float | None], start: int) -> tuple[int, list[Tried]]:
    """Returns the smallest batch that a doubled one beats by no more than 2 %, and all tried.

    Args:
        rate_of: from a batch size to images a second, or None where it does not fit.
        start: to be doubled, or halved where it does not fit itself.

    Returns:
        The batch size, 0 where not even one image fits; and what was tried, in that order.
    """
    size, rate = start, rate_of(start)
    tried = [Tried(size, rate)]
    while rate is None and size > 1:
        size //= 2
        rate = rate_of(size)
        tried.append(Tried(size, rate))
    if rate is None:
        return 0, tried
    while size >= start:
        larger = rate_of(2 * size)
        tried.append(Tried(2 * size, larger))
        if larger is None or larger <= _LEAST_GAIN * rate:
            break
        size, rate = 2 * size, larger
    return size, tried
