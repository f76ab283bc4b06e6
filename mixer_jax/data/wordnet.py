"""ImageNet's classes in words: WordNet IDs, such as n02012849, with the words that they stand for.

The table next to this module is from timm, and its words are from WordNet 3.0; see the file NOTICE.
`python -m tests.baselines.write_wordnet` writes it.
"""

import functools
import gzip
import itertools
import re
from pathlib import Path
from typing import NamedTuple

# One line per class, in the order of the IDs, with tabs between its three columns: the ID's number
# minus that of the line before, which compresses better; the numbers of classes of the heads that
# have the class; its words, with commas between synonyms.
TABLE = Path(__file__).with_name("wordnet.tsv.gz")
_WNID = re.compile(r"n\d{8}")


def describe_class(name: str) -> str:
    """Returns the words of a class that is named by its WordNet ID; empty for other names.

    Classes can have equal words: n02012849 is the bird, n03126707 the machine "crane".
    """
    entry = _read_table().get(name) if _WNID.fullmatch(name) else None
    return entry.words if entry else ""


def label_class(name: str) -> str:
    """Formats the name of a class for figures: "tench (n01440764)", or the name if it is no ID."""
    words = describe_class(name)
    return f"{words.partition(', ')[0]} ({name})" if words else name


@functools.cache
def imagenet_wnids(num_classes: int) -> tuple[str, ...]:
    """Lists the classes of a published ImageNet head, in the order of its outputs.

    Args:
        num_classes: Outputs of the head: 1,000 for ImageNet-1k, 21,843 for ImageNet-21k as Google's
            models have it, 11,221 for ImageNet-21k-P. Others give an empty list.
    """
    size = str(num_classes)
    return tuple(wnid for wnid, entry in _read_table().items() if size in entry.head_sizes)


class _Entry(NamedTuple):
    head_sizes: list[str]
    words: str


@functools.cache
def _read_table() -> dict[str, _Entry]:
    with gzip.open(TABLE, "rt", encoding="utf-8") as file:
        steps, sizes, words = zip(*(line.rstrip("\n").split("\t") for line in file), strict=True)
    wnids = (f"n{number:08}" for number in itertools.accumulate(map(int, steps)))
    entries = map(_Entry, map(str.split, sizes), words)
    return dict(zip(wnids, entries, strict=True))
