"""Sources made of sources: side by side, classes joined by their names, or some examples."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

from mixer_jax.data.source import Example, MixtureComponent, Source
from mixer_jax.errors import UserError


def mix_sources(sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """Returns a source whose training order draws from each of several in proportion to a weight.

    Its classes are those of all sources; classes of the same name are one. Every source is shuffled
    by itself and seen whole before any of its examples comes again.

    Args:
        sources: to mix.
        weights: one for each, above zero; they need not sum to one.
    """
    class_names = tuple(dict.fromkeys(name for source in sources for name in source.class_names))
    joined = [relabel(source, class_names) for source in sources]
    stops = list(itertools.accumulate(len(source) for source in joined))
    starts = [0, *stops[:-1]]
    names = [f"{weight:g} × {s.name}" for s, weight in zip(sources, weights, strict=True)]
    return Source(
        " + ".join(names),
        _Concat([source.examples for source in joined], starts),
        class_names,
        mixture=tuple(map(MixtureComponent, starts, stops, weights)),
    )


def relabel(source: Source, class_names: tuple[str, ...]) -> Source:
    """Returns the same examples with labels that index `class_names`.

    Args:
        source: whose classes are among `class_names`, under the same names.
        class_names: a name for each class.

    Raises:
        UserError: a class of the source is none of them.
    """
    if source.class_names == class_names:
        return source
    places = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in source.class_names if name not in places]
    if unknown:
        raise UserError(
            f"{source.name} has other classes ({source.num_classes}: {_some(source.class_names)}) "
            f"than these {len(class_names)}: {_some(class_names)}"
        )
    labels = tuple(places[name] for name in source.class_names)
    examples = _Relabelled(source.examples, labels)
    return Source(source.name, examples, class_names, source.multi_label, source.mixture)


def subset(source: Source, places: Sequence[int]) -> Source:
    """Returns some of the examples of a source, in the order given.

    Args:
        source: to choose from.
        places: of the examples in it.
    """
    examples = _Subset(source.examples, places)
    return Source(source.name, examples, source.class_names, source.multi_label)


class _Concat(Sequence[Example]):
    """Sequences one after the other."""

    def __init__(self, sequences: list[Sequence[Any]], starts: list[int]):
        self._sequences, self._starts = sequences, starts

    def __len__(self) -> int:
        return self._starts[-1] + len(self._sequences[-1])

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sequences[number][index - self._starts[number]]


class _Relabelled(Sequence[Example]):
    """Examples with other labels."""

    def __init__(self, examples: Sequence[Any], labels: tuple[int, ...]):
        self._examples, self._labels = examples, labels

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        labels = tuple(self._labels[label] for label in example["labels"])
        return Example(image=example["image"], labels=labels, name=example["name"])


class _Subset(Sequence[Example]):
    """Examples at some places of a sequence."""

    def __init__(self, examples: Sequence[Any], places: Sequence[int]):
        self._examples, self._places = examples, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[self._places[index]]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
