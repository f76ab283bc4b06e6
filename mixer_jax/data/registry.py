"""Opening datasets by name."""

from mixer_jax.data.folder import list_folder_splits, open_folder
from mixer_jax.data.manifest import list_manifest_splits, open_manifest
from mixer_jax.data.names import FOLDER, MANIFEST, SYNTHETIC, WEB_DATASET
from mixer_jax.data.source import Source
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.data.tfds import open_tfds
from mixer_jax.data.webdataset import list_webdataset_splits, open_webdataset


def open_dataset(
    name: str, split: str, data_dir: str = "", *, num_classes: int = 0, num_examples: int = 0
) -> Source:
    """Opens one split of a dataset.

    Args:
        name: TFDS dataset with images and labels, optionally with @ and a label
            ("clevr@count_all"); "folder:PATH"; "manifest:FILE" or "wds:PATH", optionally with @
            and a column or field;
            "digits"; or "synthetic".
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
    if name.startswith(FOLDER):
        return open_folder(name.removeprefix(FOLDER), split)
    if name.startswith(MANIFEST):
        return open_manifest(name.removeprefix(MANIFEST), split)
    if name.startswith(WEB_DATASET):
        return open_webdataset(name.removeprefix(WEB_DATASET), split)
    return open_tfds(name, split, data_dir)


def list_splits(name: str) -> tuple[str, ...]:
    """Lists the splits of a dataset whose name has a prefix, such as "folder:PATH".

    Raises:
        UserError: The dataset does not exist.
    """
    if name.startswith(MANIFEST):
        return list_manifest_splits(name.removeprefix(MANIFEST))
    if name.startswith(WEB_DATASET):
        return list_webdataset_splits(name.removeprefix(WEB_DATASET))
    return list_folder_splits(name.removeprefix(FOLDER))
