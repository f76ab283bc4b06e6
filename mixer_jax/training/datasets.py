"""From a configuration to the data of a run."""

from typing import NamedTuple

from ml_collections import ConfigDict

from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source, mix_sources, relabel
from mixer_jax.errors import UserError
from mixer_jax.evaluation.probes import align_labels


class RunDatasets(NamedTuple):
    """The data of a run.

    Attributes:
        train: what it trains on.
        evals: by name, what it is scored on.
        probe_train: by name of those that are probes, what they learn from.
    """

    train: Source
    evals: dict[str, Source]
    probe_train: dict[str, Source]


def open_datasets(config: ConfigDict) -> RunDatasets:
    """Opens the training and evaluation data; uses no device.

    Raises:
        UserError: as `open_train_dataset`; or an evaluation's data set or split is missing, or it
            has a class that training lacks, or for a probe, that the split it learns from lacks.
    """
    train = open_train_dataset(config)
    evals, probe_train = {}, {}
    for key, entry in config.evals.items():
        source = _open_eval(config, entry, entry.split)
        if entry.type != "classify":
            probe_train[key] = _open_eval(config, entry, entry.train_split)
        try:
            if key in probe_train:
                evals[key] = align_labels(probe_train[key], source)
            else:
                evals[key] = _known_to(train, source)
        except UserError as error:
            raise UserError(f"config.evals.{key}: {error}") from error
    return RunDatasets(train, evals, probe_train)


def _known_to(train: Source, source: Source) -> Source:
    try:
        return relabel(source, train.class_names)
    except UserError as error:
        raise UserError(f"{error}; score on classes trained on") from error


def _open_eval(config: ConfigDict, entry: ConfigDict, split: str) -> Source:
    return open_dataset(
        entry.dataset or config.dataset.name,
        split,
        config.dataset.data_dir,
        num_classes=config.dataset.num_classes,
    )


def open_train_dataset(config: ConfigDict) -> Source:
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
        return open_dataset(name, config.dataset.train_split, data_dir, **nominal)
    entries = config.mixture.values()
    sources = [
        open_dataset(entry.dataset or name, entry.split, data_dir, **nominal) for entry in entries
    ]
    return mix_sources(sources, [entry.weight for entry in entries])
