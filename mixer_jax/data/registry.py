"""Where examples come from: opens a data set by its name."""

from mixer_jax.data.folder import FOLDER, open_folder
from mixer_jax.data.source import Source
from mixer_jax.data.synthetic import SYNTHETIC, synthetic_source
from mixer_jax.data.tfds import open_tfds


def open_dataset(
    name: str, split: str, data_dir: str = "", *, num_classes: int = 0, num_examples: int = 0
) -> Source:
    """Opens one split of a data set.

    Args:
        name: a data set of TFDS with images and labels, perhaps with a label after an @
            ("clevr@count_all"); "folder:PATH"; "digits"; or "synthetic".
        split: in TFDS syntax, e.g. "train[:99%]". Synthetic data take any name.
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.
        num_classes: of synthetic data, 0: 1000; real ones bring their own.
        num_examples: likewise, 0: 1024.

    Raises:
        UserError: the data set or split does not exist, or is not prepared; says how to do it.
    """
    if name == SYNTHETIC:
        return synthetic_source(split, num_classes or 1000, num_examples or 1024)
    if name.startswith(FOLDER):
        return open_folder(name.removeprefix(FOLDER), split)
    return open_tfds(name, split, data_dir)
