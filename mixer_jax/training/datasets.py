"""Datasets of a run, opened from its config."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from mixer_jax.config.schema import (
    LABEL_METRICS,
    MULTI_LABEL_METRICS,
    EvalConfig,
    RecipeConfig,
    RunConfig,
)
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.labeled_files import check_readable
from mixer_jax.data.loader import available_cpus
from mixer_jax.data.names import FOLDER, MANIFEST
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source, mix_sources, relabel
from mixer_jax.distributed import multihost
from mixer_jax.errors import MissingFileError, RunError, UserError, describe_error
from mixer_jax.evaluation.probes import align_labels

# Labels that a thread counts at a time.
_LABELS_PER_TASK = 1_000


class RunDatasets(NamedTuple):
    """Datasets of a run: for training, and by the name of each evaluation.

    Attributes:
        train: Training data.
        evals: Evaluation data.
        probe_train: Examples that probes are fitted on.
        fingerprint: Identity of the training data, independent of its location; empty if unknown.
        class_weights: Factor of the loss of an example, by its class; None: 1.
    """

    train: Source
    evals: dict[str, Source]
    probe_train: dict[str, Source]
    fingerprint: Mapping[str, str] = MappingProxyType({})
    class_weights: Float32[np.ndarray, " classes"] | None = None

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
        UserError: A dataset or split does not exist, the recipe does not fit the training data, or
            classes of an evaluation are missing from its training split.
    """
    train = open_train_dataset(config)
    _check_best_metric(config, train)
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
    for source in (train, *evals.values(), *probe_train.values()):
        # Then a file that changes during the run is a bad image.
        source.record_file_sizes()
    return RunDatasets(train, evals, probe_train, train.fingerprint())


def open_train_dataset(config: RunConfig) -> Source:
    """Opens the training data; uses no device.

    Raises:
        UserError: A dataset or split does not exist, has one class or classes without readable
            images, or has several labels per image, which the recipe does not fit.
    """
    train = _open_train_source(config)
    if train.num_classes < 2:
        raise UserError(
            f"config.dataset.name must have at least two classes, got {train.name} with "
            f"{', '.join(map(repr, train.class_names)) or 'none'}."
            + "".join(f" {note}." for note in train.notes)
        )
    if train.multi_label:
        _check_multi_label_recipe(config.recipe, train.name)
    return train


def _check_multi_label_recipe(recipe: RecipeConfig, name: str) -> None:
    """Raises UserError if a recipe is only defined for one label per image."""
    rules: list[tuple[str, Any, str]] = [
        ("loss", "sigmoid", "The softmax loss needs one label per image."),
        ("label_smoothing", 0.0, "config.recipe.min_target smooths the target of every class."),
        ("class_weights", "none", "Class weights are defined for one label per image."),
    ]
    for key, value, fix in rules:
        if (got := getattr(recipe, key)) != value:
            raise UserError(
                f"config.recipe.{key} must be {value!r} for {name}, which has any number of labels "
                f"per image, got {got!r}. {fix}"
            )


def _check_best_metric(config: RunConfig, train: Source) -> None:
    """Raises UserError if `checkpoint.best_metric` is of the head, and not defined for the data."""
    name = config.checkpoint.best_metric
    evaluation, _, metric = name.rpartition("/")
    if not name or config.evals[evaluation].type != "classify":
        return
    metrics = MULTI_LABEL_METRICS if train.multi_label else LABEL_METRICS
    if metric not in metrics:
        labels = "any number of labels" if train.multi_label else "one label"
        choices = ", ".join(f"{evaluation}/{choice}" for choice in metrics)
        raise UserError(
            f"config.checkpoint.best_metric must be one of {choices} for {train.name}, which has "
            f"{labels} per image, got {name!r}."
        )


def balanced_class_weights(source: Source, num_threads: int = 0) -> Float32[np.ndarray, " classes"]:
    """Computes weights that are inversely proportional to the frequency of each class.

    Those of scikit-learn's `compute_class_weight("balanced")`: n / (k × n_c) for n examples of k
    classes, of which n_c belong to class c, so that the mean weight of an example is 1. In a
    mixture, frequencies are those of the examples that are sampled. Labels are read without
    decoding images.

    Args:
        source: Source with one label per example. Examples that cannot be read do not count.
        num_threads: Threads that read labels; 0: one per CPU core.

    Returns:
        One weight per class; 0 for a class without examples, which does not count as one.
    """

    def count(indices: range) -> Int[np.ndarray, " classes"]:
        counts = np.zeros(source.num_classes, np.int64)
        for index in indices:
            with contextlib.suppress(BadImageError):
                counts[source.read_labels(index)[0]] += 1
        return counts

    frequencies = np.zeros(source.num_classes)
    with ThreadPoolExecutor(num_threads or available_cpus()) as pool:
        for component in source.components:
            starts = range(component.start, component.stop, _LABELS_PER_TASK)
            ends = (min(start + _LABELS_PER_TASK, component.stop) for start in starts)
            counts = sum(pool.map(count, map(range, starts, ends)))
            frequencies += component.weight * counts / max(1, np.sum(counts))
    frequencies /= frequencies.sum()
    found = frequencies > 0
    weights = np.zeros(source.num_classes, np.float32)
    weights[found] = 1 / (found.sum() * frequencies[found])
    return weights


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
