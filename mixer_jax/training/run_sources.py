"""From a configuration to the data of a run."""

from typing import NamedTuple

from ml_collections import ConfigDict

from mixer_jax.data.examples import Source
from mixer_jax.data.mixture import mix, relabel
from mixer_jax.data.sources import open_source
from mixer_jax.errors import UserError


class Sources(NamedTuple):
    """The data of a run: what it trains on and, by name, what it is scored on."""

    train: Source
    evals: dict[str, Source]


def open_sources(config: ConfigDict) -> Sources:
    """Opens the training and evaluation data; uses no device.

    Raises:
        UserError: as `open_training`; or an evaluation's data set or split is missing, or it has a
            class that training lacks.
    """
    train = open_training(config)
    evals = {}
    for key, entry in config.evals.items():
        source = open_source(
            entry.dataset or config.dataset.name,
            entry.split,
            config.dataset.data_dir,
            num_classes=config.dataset.num_classes,
        )
        try:
            evals[key] = relabel(source, train.class_names)
        except UserError as error:
            raise UserError(f"config.evals.{key}: {error}; score on classes trained on") from error
    return Sources(train, evals)


def open_training(config: ConfigDict) -> Source:
    """Opens the training data alone; uses no device.

    Raises:
        UserError: a data set or split is missing, or has several labels an image.
    """
    train = _one_or_mixed(config)
    if train.multi_label:
        raise UserError(
            f"{train.name} has several labels an image and is for evaluation; name another in "
            "config.dataset.name"
        )
    return train


def _one_or_mixed(config: ConfigDict) -> Source:
    nominal = {
        "num_classes": config.dataset.num_classes,
        "num_examples": config.dataset.num_examples,
    }
    name, data_dir = config.dataset.name, config.dataset.data_dir
    if not config.mixture:
        return open_source(name, config.dataset.train_split, data_dir, **nominal)
    entries = config.mixture.values()
    sources = [
        open_source(entry.dataset or name, entry.split, data_dir, **nominal) for entry in entries
    ]
    return mix(sources, [entry.weight for entry in entries])
