"""What is compared takes turns: the order of every round, and what is made of the times."""

import statistics
from collections.abc import Sequence


def order(names: Sequence[str], number: int) -> list[str]:
    """Returns the order of a round: each begins once in as many rounds as there are names."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def order_apart(names: Sequence[str], others: Sequence[str], number: int) -> list[str]:
    """Returns the order of a round in which two groups must not mix.

    The group that ended a round begins the next.
    """
    groups = [order(group, number) for group in (names, others) if group]
    if number % 2:
        groups.reverse()
    return [name for group in groups for name in group]


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Returns the median over rounds of a time to that of the base in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def utilisation(flops: float, times: Sequence[float], product_rates: Sequence[float]) -> float:
    """Returns the median over rounds of the model's FLOP/s to those of a bare matrix product.

    Args:
        flops: of the model in a step.
        times: seconds a step, by round.
        product_rates: FLOP/s of the product, by round.
    """
    rates = [flops / seconds for seconds in times]
    return ratio(rates, product_rates)
