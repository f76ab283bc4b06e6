"""Data sources: random access to encoded images with labels; mixtures, relabeling and subsets."""

import bisect
import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from mixer_jax.errors import UserError, abbreviate, escape_control_characters

# Start of the digests in fingerprints: one of names and, after a hyphen, one of names and sizes.
DIGEST = "blake2b:"
# Label that is missing or not a class, and the reason why its image is bad.
NO_LABEL = -1
BAD_LABEL = "label is missing or not a class"

# Integers in their usual spelling: "007" is a name. Those of more digits are identifiers.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


class Example(TypedDict):
    """Encoded image with its labels.

    Attributes:
        image: Bytes of the image file.
        labels: Class indices: exactly one, or any number in a multi-label source.
        name: Path of the file, or position in the dataset, by which a person finds the image.
    """

    image: bytes
    labels: tuple[int, ...]
    name: str


class Examples(Sequence[Example]):
    """Random access to examples, or to their labels alone."""

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Reads the labels of one example; subclasses do so without reading its image."""
        return self[index]["labels"]

    def fingerprint(self) -> dict[str, str]:
        """Computes values that identify the examples independently of location, by meaning."""
        return {}

    def record_file_sizes(self) -> None:
        """Records the sizes of files; subclasses that read a file per example override it.

        An example is bad if its file has another size when it is read.
        """

    def check_files(self) -> None:
        """Checks that this host can read the files; subclasses that read files override it.

        Raises:
            MissingFileError: A file does not exist.
            RunError: A file cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class LabelArrays:
    """Labels of many examples, in compact arrays.

    Attributes:
        values: Class indices of all examples, or NO_LABEL, one example after the other; integers.
        ends: Index into `values` after the last label of each example; None: every example has one
            label.
    """

    values: np.ndarray
    ends: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.ends is None else len(self.ends)

    @property
    def owners(self) -> np.ndarray:
        """Index of the example of each label, (num_labels,)."""
        return np.repeat(np.arange(len(self)), self._counts())

    def read(self, index: int) -> tuple[int, ...]:
        """Returns the labels of one example."""
        if self.ends is None:
            return (int(self.values[index]),)
        start = self.ends[index - 1] if index else 0
        return tuple(self.values[start : self.ends[index]].tolist())

    def select(self, indices: np.ndarray) -> "LabelArrays":
        """Selects examples, in the order of `indices`, (n,)."""
        if self.ends is None:
            return LabelArrays(self.values[indices])
        counts = self._counts()[indices]
        ends = np.cumsum(counts)
        # Of each label: its place among those of its example, and the first label of that one.
        places = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
        starts = np.repeat(self.ends[indices] - counts, counts)
        return LabelArrays(self.values[starts + places], ends)

    def digest(self) -> str:
        """Computes a digest of all labels, in their order."""
        digest = hashlib.blake2b(self.values.astype("<i8").tobytes(), digest_size=8)
        if self.ends is not None:
            digest.update(self.ends.astype("<i8").tobytes())
        return digest.hexdigest()

    def _counts(self) -> np.ndarray:
        if self.ends is None:
            return np.ones(len(self), np.int64)
        return np.diff(self.ends, prepend=0)


class MixtureComponent(NamedTuple):
    """Range of examples that is shuffled on its own during training.

    Attributes:
        start: Index of the first example.
        stop: Index after the last example.
        weight: Sampling weight, relative to the weights of the other components.
    """

    start: int
    stop: int
    weight: float


@dataclasses.dataclass(frozen=True)
class Source:
    """Split of a dataset, or a mixture of several.

    Attributes:
        name: Dataset and split, for messages.
        examples: Random access to every `Example`, in an order that never changes. Reading one may
            raise BadImageError.
        class_names: Name of each class, in Unicode normal form NFC.
        multi_label: Whether an example may have any number of labels.
        mixture: Components of a mixture; empty for a single dataset.
        notes: Lines for the user about what was skipped or chosen when the source was opened.
    """

    name: str
    examples: Sequence[Any]  # Not Sequence[Example]: runtime type checkers would read examples.
    class_names: tuple[str, ...]
    multi_label: bool = False
    mixture: tuple[MixtureComponent, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Normalizes the class names."""
        object.__setattr__(self, "class_names", normalize_names(self.class_names))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def components(self) -> tuple[MixtureComponent, ...]:
        """Components of the mixture, or a single one with all examples."""
        return self.mixture or (MixtureComponent(0, len(self), 1.0),)

    def __len__(self) -> int:
        return len(self.examples)

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Reads the labels of one example, without its image if the dataset allows it.

        Raises:
            BadImageError: The labels cannot be read.
        """
        return _read_labels(self.examples, index)

    def fingerprint(self) -> dict[str, str]:
        """Computes values that identify the examples independently of location, by meaning.

        File sizes of image folders are read, but not the contents.
        """
        return _fingerprint(self.examples)

    def record_file_sizes(self) -> None:
        """Records the sizes of image files: a file that changes later is a bad image.

        `fingerprint`, which contains them, records them as well.
        """
        _record_file_sizes(self.examples)

    def check_files(self) -> None:
        """Checks that this host can read the first file of each dataset.

        Raises:
            MissingFileError: The file does not exist.
            RunError: The file cannot be read.
        """
        _check_files(self.examples)


def normalize_names(names: Iterable[str]) -> tuple[str, ...]:
    r"""Converts names to Unicode normal form NFC, and control characters to escapes such as \x1b.

    Systems differ in how they store accented letters, as one or as two characters. Control
    characters in the names of other people's classes would change the terminal that shows them.
    """
    return tuple(escape_control_characters(unicodedata.normalize("NFC", name)) for name in names)


def sort_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts the names of classes: by value if all of them are integers, otherwise as text."""
    names = list(names)
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def absent_class_notes(class_names: Sequence[str], labels: LabelArrays, place: str) -> list[str]:
    """Returns a note if classes have no examples.

    Args:
        class_names: Name of each class.
        labels: Labels of the examples.
        place: Dataset and split, for the note.
    """
    absent = np.setdiff1d(np.arange(len(class_names)), labels.values).tolist()
    if not absent:
        return []
    listed = abbreviate(repr(class_names[label]) for label in absent)
    return [f"{place}: no examples of {len(absent):,} of {len(class_names):,} classes: {listed}"]


def mix_sources(sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """Mixes sources, to be sampled in proportion to their weights.

    The classes are the union of the sources' classes; classes with the same name are merged. The
    mixture is multi-label if any source is. Each source is shuffled on its own, and all of it is
    seen before any of its examples repeats.

    Args:
        sources: Sources to mix.
        weights: Positive weight of each source; they need not sum to one.
    """
    class_names = tuple(dict.fromkeys(name for source in sources for name in source.class_names))
    relabeled = [relabel(source, class_names) for source in sources]
    stops = list(itertools.accumulate(len(source) for source in relabeled))
    starts = [0, *stops[:-1]]
    names = [f"{weight:g} × {s.name}" for s, weight in zip(sources, weights, strict=True)]
    return Source(
        " + ".join(names),
        _ConcatExamples([source.examples for source in relabeled], starts),
        class_names,
        any(source.multi_label for source in sources),
        mixture=tuple(map(MixtureComponent, starts, stops, weights)),
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
    )


def relabel(source: Source, class_names: tuple[str, ...]) -> Source:
    """Maps labels to indices into `class_names`, matching classes by name.

    Args:
        source: Source whose class names all occur in `class_names`.
        class_names: Name of each class of the result.

    Raises:
        UserError: A class of `source` is missing from `class_names`.
    """
    class_names = normalize_names(class_names)
    if source.class_names == class_names:
        return source
    index_of = {name: index for index, name in enumerate(class_names)}
    unknown = [name for name in source.class_names if name not in index_of]
    if unknown:
        raise UserError(
            f"classes of {source.name} must be among these {len(class_names):,}: "
            f"{abbreviate(class_names)}, got {source.num_classes:,}, of which {len(unknown):,} "
            f"{'is' if len(unknown) == 1 else 'are'} unknown: {abbreviate(unknown)}."
        )
    label_map = tuple(index_of[name] for name in source.class_names)
    examples = _RelabeledExamples(source.examples, label_map)
    return dataclasses.replace(source, examples=examples, class_names=class_names)


def subset(source: Source, indices: Sequence[int]) -> Source:
    """Selects examples of a source by their indices, in the order of `indices`."""
    examples = _ExampleSubset(source.examples, indices)
    return dataclasses.replace(source, examples=examples, mixture=())


def _read_labels(examples: Sequence[Any], index: int) -> tuple[int, ...]:
    if isinstance(examples, Examples):
        return examples.read_labels(index)
    return examples[index]["labels"]


def _fingerprint(examples: Sequence[Any]) -> dict[str, str]:
    return examples.fingerprint() if isinstance(examples, Examples) else {}


def _record_file_sizes(examples: Sequence[Any]) -> None:
    if isinstance(examples, Examples):
        examples.record_file_sizes()


def _check_files(examples: Sequence[Any]) -> None:
    if isinstance(examples, Examples):
        examples.check_files()


def describe_changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Describes differences between fingerprints by values, or by what a digest is of."""
    changes = []
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, "(absent)"), new.get(key, "(absent)")
        if was != now:
            names = [value.partition("-")[0] for value in (was, now)]
            if not was.startswith(DIGEST) and not now.startswith(DIGEST):
                changes.append(f"{key} ({was!r} -> {now!r})")
            else:
                changes.append(f"{'sizes' if names[0] == names[1] else 'names'} of {key}")
    return changes


class _ConcatExamples(Examples):
    """Concatenation of sequences of examples."""

    def __init__(self, sequences: list[Sequence[Any]], starts: list[int]):
        self._sequences, self._starts = sequences, starts

    def __len__(self) -> int:
        return self._starts[-1] + len(self._sequences[-1])

    def __getitem__(self, index: Any) -> Any:
        component, index = self._locate(index)
        return self._sequences[component][index]

    def read_labels(self, index: int) -> tuple[int, ...]:
        component, index = self._locate(index)
        return _read_labels(self._sequences[component], index)

    def fingerprint(self) -> dict[str, str]:
        return {
            f"{key} of component {number}": value
            for number, examples in enumerate(self._sequences, 1)
            for key, value in _fingerprint(examples).items()
        }

    def record_file_sizes(self) -> None:
        for examples in self._sequences:
            _record_file_sizes(examples)

    def check_files(self) -> None:
        for examples in self._sequences:
            _check_files(examples)

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the component of an example, and its index there."""
        index = range(len(self))[index]
        component = bisect.bisect_right(self._starts, index) - 1
        return component, index - self._starts[component]


class _RelabeledExamples(Examples):
    """Examples whose labels are mapped."""

    def __init__(self, examples: Sequence[Any], label_map: tuple[int, ...]):
        self._examples, self._label_map = examples, label_map

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        labels = self._map(example["labels"])
        return Example(image=example["image"], labels=labels, name=example["name"])

    def read_labels(self, index: int) -> tuple[int, ...]:
        return self._map(_read_labels(self._examples, index))

    def fingerprint(self) -> dict[str, str]:
        # Names of classes are compared on their own.
        return _fingerprint(self._examples)

    def record_file_sizes(self) -> None:
        _record_file_sizes(self._examples)

    def check_files(self) -> None:
        _check_files(self._examples)

    def _map(self, labels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._label_map[label] for label in labels)


class _ExampleSubset(Examples):
    """Examples at selected indices."""

    def __init__(self, examples: Sequence[Any], indices: Sequence[int]):
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[self._indices[index]]

    def read_labels(self, index: int) -> tuple[int, ...]:
        return _read_labels(self._examples, self._indices[index])

    def fingerprint(self) -> dict[str, str]:
        indices = hashlib.blake2b(repr(list(map(int, self._indices))).encode(), digest_size=8)
        return _fingerprint(self._examples) | {"indices": indices.hexdigest()}

    def record_file_sizes(self) -> None:
        _record_file_sizes(self._examples)

    def check_files(self) -> None:
        _check_files(self._examples)
