"""Names of datasets that are not TFDS's. Imports nothing heavy."""

# Prefixes of paths: of a folder of images; of a table of images; of a local folder or a name on the
# Hub that the library `datasets` reads; and of shards of WebDataset.
FOLDER = "folder:"
MANIFEST = "manifest:"
HUGGING_FACE = "hf:"
WEB_DATASET = "wds:"
PATH_PREFIXES = (FOLDER, MANIFEST, HUGGING_FACE, WEB_DATASET)
SYNTHETIC = "synthetic"
# Between a dataset and one of its labels.
LABEL_SEPARATOR = "@"


def split_label(path: str) -> tuple[str, str]:
    """Splits PATH@LABEL into path and label, which is empty without an @.

    An @ in a directory is part of the path.
    """
    before, separator, after = path.rpartition(LABEL_SEPARATOR)
    return (before, after) if separator and "/" not in after else (path, "")
