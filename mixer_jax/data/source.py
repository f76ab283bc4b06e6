"""What a source is: a random-access list of encoded images and labels, with its classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict


class Example(TypedDict):
    """One labelled image.

    Attributes:
        image: the bytes of its file.
        labels: indices of its classes: one, or for a set of several right answers any number.
        name: what a person finds it by: its path, or its place in the data set.
    """

    image: bytes
    labels: tuple[int, ...]
    name: str


class MixtureComponent(NamedTuple):
    """Some of the examples of a source, which training shuffles by themselves.

    Attributes:
        start: index of the first.
        stop: index after the last.
        weight: how often it is seen, in proportion to the other parts' weights.
    """

    start: int
    stop: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set, or several mixed.

    Attributes:
        name: data set and split, for people.
        examples: random access to every `Example`; the order never changes. Reading one may raise
            a BadImageError.
        class_names: a name for each class.
        multi_label: whether an example may have several right answers, or none.
        mixture: the parts of a mixture; empty for one data set.
    """

    name: str
    examples: Sequence[Any]  # Not of Example: a type checker at run time would read some.
    class_names: tuple[str, ...]
    multi_label: bool = False
    mixture: tuple[MixtureComponent, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def parts(self) -> tuple[MixtureComponent, ...]:
        """The parts of a mixture, or the whole as one part."""
        return self.mixture or (MixtureComponent(0, len(self), 1.0),)

    def __len__(self) -> int:
        return len(self.examples)
