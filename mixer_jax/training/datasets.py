"""Datasets of a run, opened from its config."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mixer_jax.config.schema import EvalConfig, RunConfig
from mixer_jax.data.labeled_files import check_readable
from mixer_jax.data.names import FOLDER, MANIFEST
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source, mix_sources, relabel
from mixer_jax.distributed import multihost
from mixer_jax.errors import MissingFileError, RunError, UserError, describe_error
from mixer_jax.evaluation.probes import align_labels


class RunDatasets(NamedTuple):
    """Datasets of a run: for training, and by the name of each evaluation.

    Attributes:
        train: Training data.
        evals: Evaluation data.
        probe_train: Examples that probes are fitted on.
        fingerprint: Identity of the training data, independent of its location; empty if unknown.
    """

    train: Source
    evals: dict[str, Source]
    probe_train: dict[str, Source]
    fingerprint: Mapping[str, str] = MappingProxyType({})

    @property
    def notes(self) -> list[str]:
        """Notes of all sources, without repetitions."""
        return list(dict.fromkeys(note for source in self._sources for note in source.notes))

    @property
    def _sources(self) -> list[Source]:
        return [self.train, *self.evals.values(), *self.probe_train.values()]

    def check_hosts(self) -> None:
        """Checks that every host finds the data; all hosts must call it together.

        Raises:
            UserError: A file is missing on some host; raised on all hosts.
            RunError: A file cannot be read on some host, perhaps only for the moment; raised on all
                hosts.
        """
        missing = failure = ""
        try:
            for source in self._sources:
                source.check_files()
        except MissingFileError as error:
            missing = str(error)
        except Exception as error:
            # The other hosts wait for the text of this one, whatever the error.
            failure = describe_error(error)
        missing_by_host = multihost.gather_text(missing)
        failure_by_host = multihost.gather_text(failure)
        for host, found in enumerate(missing_by_host):
            if found:
                raise UserError(
                    f"data must be at the same path on every host, got on host {host}: {found} "
                    "Copy the data there, or use a file system that all hosts share."
                )
        for host, found in enumerate(failure_by_host):
            if found:
                raise RunError(f"data cannot be read on host {host}: {found}")


def open_datasets(config: RunConfig) -> RunDatasets:
    """Opens the training and evaluation data; uses no device.

    Raises:
        UserError: A dataset or split does not exist, the training data has several labels per
            image, or classes of an evaluation are missing from its training split.
    """
    train = open_train_dataset(config)
    evals, probe_train = {}, {}
    for name, entry in config.evals.items():
        source = _open_eval_split(config, entry, entry.split)
        if entry.type != "classify":
            probe_train[name] = _open_eval_split(config, entry, entry.train_split)
        try:
            if name in probe_train:
                evals[name] = align_labels(probe_train[name], source)
            else:
                evals[name] = _relabel(source, train)
        except UserError as error:
            raise UserError(f"config.evals.{name}: {error}") from error
    return RunDatasets(train, evals, probe_train, train.fingerprint())


def open_train_dataset(config: RunConfig) -> Source:
    """Opens the training data; uses no device.

    Raises:
        UserError: A dataset or split does not exist, or has several labels per image, one class, or
            classes without readable images.
    """
    train = _open_train_source(config)
    if train.num_classes < 2:
        raise UserError(
            f"config.dataset.name must have at least two classes, got {train.name} with "
            f"{', '.join(map(repr, train.class_names)) or 'none'}."
            + "".join(f" {note}." for note in train.notes)
        )
    if train.multi_label:
        raise UserError(
            f"config.dataset.name must have one label per image, got {train.name}, which has "
            "several and can only be evaluated on."
        )
    return train


def _open_train_source(config: RunConfig) -> Source:
    """Opens one dataset, or mixes those of `config.mixture`."""
    dataset = config.dataset

    def open_split(name: str, split: str) -> Source:
        source = open_dataset(
            name,
            split,
            dataset.data_dir,
            num_classes=dataset.num_classes,
            num_examples=dataset.num_examples,
        )
        if name.startswith((FOLDER, MANIFEST)):
            check_readable(source)
        return source

    if not config.mixture:
        return open_split(dataset.name, dataset.train_split)
    entries = config.mixture.values()
    sources = [open_split(entry.dataset or dataset.name, entry.split) for entry in entries]
    return mix_sources(sources, [entry.weight for entry in entries])


def _open_eval_split(config: RunConfig, entry: EvalConfig, split: str) -> Source:
    return open_dataset(
        entry.dataset or config.dataset.name,
        split,
        config.dataset.data_dir,
        num_classes=config.dataset.num_classes,
    )


def _relabel(source: Source, train: Source) -> Source:
    """Maps the labels of an evaluation split to the classes of the training data."""
    try:
        return relabel(source, train.class_names)
    except UserError as error:
        raise UserError(f"{error} Evaluate on classes that the training data has.") from error
