"""Opening datasets by name."""

from collections.abc import Callable

from mixer_jax.data.folder import list_folder_splits, open_folder
from mixer_jax.data.huggingface import list_hugging_face_splits, open_hugging_face
from mixer_jax.data.manifest import list_manifest_splits, open_manifest
from mixer_jax.data.names import FOLDER, HUGGING_FACE, MANIFEST, SYNTHETIC, WEB_DATASET
from mixer_jax.data.source import Source
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.data.tfds import open_tfds
from mixer_jax.data.webdataset import list_webdataset_splits, open_webdataset

# By prefix: functions of the rest of a name. One opens a split, the other lists the splits.
_FORMATS: dict[str, tuple[Callable[[str, str], Source], Callable[[str], tuple[str, ...]]]] = {
    FOLDER: (open_folder, list_folder_splits),
    MANIFEST: (open_manifest, list_manifest_splits),
    HUGGING_FACE: (open_hugging_face, list_hugging_face_splits),
    WEB_DATASET: (open_webdataset, list_webdataset_splits),
}


def open_dataset(
    name: str, split: str, data_dir: str = "", *, num_classes: int = 0, num_examples: int = 0
) -> Source:
    """Opens one split of a dataset.

    Args:
        name: TFDS dataset with images and labels, optionally with @ and a label
            ("clevr@count_all"); "folder:PATH"; "manifest:FILE", "hf:NAME_OR_PATH" or "wds:PATH",
            optionally with @ and a column or field; "digits"; or "synthetic".
        split: Split in TFDS syntax, e.g. "train[:99%]"; any text for synthetic data.
        data_dir: Directory of the TFDS datasets; empty: TFDS's default.
        num_classes: Number of classes of synthetic data; 0: 1000. Ignored for other datasets.
        num_examples: Number of synthetic examples; 0: 1024. Ignored for other datasets.

    Raises:
        UserError: The dataset or split does not exist, or is not prepared. The message says how to
            prepare it.
    """
    if name == SYNTHETIC:
        return synthetic_source(split, num_classes or 1000, num_examples or 1024)
    for prefix, (open_split, _) in _FORMATS.items():
        if name.startswith(prefix):
            return open_split(name.removeprefix(prefix), split)
    return open_tfds(name, split, data_dir)


def list_splits(name: str) -> tuple[str, ...]:
    """Lists the splits of a dataset whose name has a prefix, such as "folder:PATH".

    Raises:
        UserError: The dataset does not exist.
    """
    prefix, _, path = name.partition(":")
    _, list_splits_of_path = _FORMATS[f"{prefix}:"]
    return list_splits_of_path(path)
