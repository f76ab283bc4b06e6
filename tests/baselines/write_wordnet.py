"""Writes the words of ImageNet's classes from timm: `python -m tests.baselines.write_wordnet`.

timm is not imported, because that needs PyTorch.
"""

import gzip
import importlib.util
import io
import itertools
import sys
from pathlib import Path

from mixer_jax.data.wordnet import TABLE

# The classes of heads, in the order of the outputs.
LISTS = ("imagenet_synsets", "imagenet21k_miil_synsets", "imagenet21k_goog_synsets")


def timm_folder() -> Path | None:
    """Finds timm's folder of lists of classes; None if timm is not installed."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder) / "data" / "_info"
    return None


def read_list(folder: Path, name: str) -> list[str]:
    """Reads the lines of one of timm's lists."""
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def format_table(folder: Path) -> str:
    """Formats the table from timm's lists.

    Raises:
        ValueError: A list is not in the order of the IDs, as the table would have it.
    """
    lines = sorted(read_list(folder, "imagenet_synset_to_lemma"))
    words = dict(line.split("\t") for line in lines)
    sizes: dict[str, list[str]] = {wnid: [] for wnid in words}
    for name in LISTS:
        wnids = read_list(folder, name)
        if wnids != sorted({*wnids}):
            raise ValueError(f"{name} must be in the order of its IDs, each once")
        for wnid in wnids:
            sizes[wnid].append(str(len(wnids)))
    numbers = [int(wnid.removeprefix("n")) for wnid in words]
    steps = (number - previous for previous, number in itertools.pairwise([0, *numbers]))
    return "".join(
        f"{step}\t{' '.join(sizes[wnid])}\t{words[wnid]}\n"
        for step, wnid in zip(steps, words, strict=True)
    )


def compress(text: str) -> bytes:
    """Compresses text to the same bytes at any time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()


if __name__ == "__main__":
    folder = timm_folder()
    if folder is None:
        sys.exit("error: timm is not installed; make test-baselines installs it")
    TABLE.write_bytes(compress(format_table(folder)))
