"""ImageNet's classes in words: WordNet IDs, such as n02012849, with the words that they stand for.

The table next to this module is from timm, and its words are from WordNet 3.0; see the file NOTICE.
`python -m tests.baselines.write_wordnet` writes it.
"""

import bisect
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
_WNID = re.compile("n[0-9]{8}")


def describe_class(name: str) -> str:
    """Returns the words of a class that is named by its WordNet ID; empty for other names.

    Classes can have equal words: n02012849 is the bird, n03126707 the machine "crane".
    """
    if not _WNID.fullmatch(name):
        return ""
    table, number = _read_table(), int(name[1:])
    index = bisect.bisect_left(table.numbers, number)
    is_found = index < len(table.numbers) and table.numbers[index] == number
    return table.words[index] if is_found else ""


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
    size, table = str(num_classes), _read_table()
    classes = zip(table.numbers, table.head_sizes, strict=True)
    return tuple(f"n{number:08}" for number, sizes in classes if size in sizes.split())


class _Table(NamedTuple):
    """Columns of the table, sorted by number.

    Every prediction reads it, and needs few of its 21,844 rows: a dictionary of the rows would take
    2.5 times as long.

    Attributes:
        numbers: WordNet IDs without their "n".
        head_sizes: Numbers of classes of the heads that have the class, separated by spaces.
        words: Words of the class.
    """

    numbers: tuple[int, ...]
    head_sizes: tuple[str, ...]
    words: tuple[str, ...]


@functools.cache
def _read_table() -> _Table:
    lines = gzip.decompress(TABLE.read_bytes()).decode().rstrip("\n").split("\n")
    steps, sizes, words = zip(*(line.split("\t") for line in lines), strict=True)
    return _Table(tuple(itertools.accumulate(map(int, steps))), sizes, words)
