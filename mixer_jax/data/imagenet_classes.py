"""WordNet IDs of the ImageNet-1k classes, which some checkpoints and label files use as names."""

import importlib.util
from pathlib import Path


def imagenet1k_wnids() -> tuple[str, ...]:
    """Reads the 1,000 WordNet IDs in the order of the class indices; empty without TFDS.

    They come from a file that TFDS ships. TFDS itself is not imported, because that takes seconds.
    """
    spec = importlib.util.find_spec("tensorflow_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "imagenet2012" / "labels.txt"
        if path.is_file():
            return tuple(path.read_text().split())
    return ()
