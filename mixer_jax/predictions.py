"""What a classifier says of an image."""

from typing import NamedTuple


class NamedProbability(NamedTuple):
    """A class and how probable it is.

    Attributes:
        label: its number.
        name: its name, or its number as text where names are not known.
        probability: in [0, 1].
    """

    label: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """What an image shows.

    Attributes:
        image: what a person finds it by.
        classes: the most probable ones, in falling order; none where the image cannot be used.
        error: why it cannot be used; empty if it can.
    """

    image: str
    classes: list[NamedProbability]
    error: str = ""
