"""WordNet ids of ImageNet-1k's classes, which some published weights and label files go by."""

import importlib.util
from pathlib import Path


def imagenet1k_wnids() -> tuple[str, ...]:
    """Returns the 1,000 ids in the order of the class numbers, or nothing without TFDS.

    They are read from a file that TFDS carries; TFDS itself is not imported, which takes seconds.
    """
    spec = importlib.util.find_spec("tensorflow_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        labels = Path(folder) / "datasets" / "imagenet2012" / "labels.txt"
        if labels.is_file():
            return tuple(labels.read_text().split())
    return ()
