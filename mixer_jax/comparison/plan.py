"""Rows of a comparison with the config of every run: varied keys, seeds and equal FLOPs.

Does not import JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from mixer_jax.comparison.models import ModelSource, check_folder_names, folder_name
from mixer_jax.config.config import parse, resolve_num_steps
from mixer_jax.config.loading import Overrides, load_config, set_override
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.models.family import ModelFamily


class Variation(NamedTuple):
    """Config key with which every config is trained several times, and its values as text."""

    key: str
    values: tuple[str, ...]

    @property
    def title(self) -> str:
        """Last part of the key, as in tables."""
        return self.key.rpartition(".")[2]


class EvalData(NamedTuple):
    """Data that all models of a comparison are evaluated on."""

    dataset: str
    split: str

    @property
    def title(self) -> str:
        """Dataset and split in words."""
        return f"{self.dataset} {self.split}"


class Entry(NamedTuple):
    """Row of a comparison: a model, with one value of the varied key if it is trained.

    Attributes:
        value: Value of the varied key; empty if there is none.
        config: Config without seed; None for models that are not trained.
    """

    model: ModelSource
    value: str = ""
    config: RunConfig | None = None

    @property
    def title(self) -> str:
        """Label and value."""
        return f"{self.model.label}, {self.value}" if self.value else self.model.label

    @property
    def folder(self) -> str:
        """Folder of the row, relative to the workdir."""
        parts = [self.model.folder, *([folder_name(self.value)] if self.value else [])]
        return "/".join(parts)


def parse_variation(text: str) -> Variation:
    """Parses KEY=VALUE,VALUE,….

    Raises:
        UserError: The text has another form, or two values are equal.
    """
    key, separator, values = text.partition("=")
    key = key.removeprefix("config.")
    parts = tuple(value.strip() for value in values.split(","))
    if not key or not separator or not all(parts):
        raise UserError(
            f"--vary must be KEY=VALUE,VALUE,…, got {text!r}. "
            "For example: --vary=optimizer.learning_rate=0.001,0.003"
        )
    check_folder_names(list(parts), f"--vary={key} must have different values")
    return Variation(key, parts)


def make_entries(
    models: Sequence[ModelSource], overrides: Overrides, variation: Variation | None
) -> list[Entry]:
    """Creates the rows of a comparison and loads their configs.

    Raises:
        UserError: A config is invalid.
    """
    entries = []
    for model in models:
        if model.kind != "config":
            entries.append(Entry(model))
            continue
        for value in variation.values if variation else [""]:
            config = load_config(model.source)
            # metrics.jsonl has the same numbers.
            config.tensorboard = False
            config.checkpoint.keep = 1
            for path, text in overrides:
                set_override(config, path, text)
            if variation:
                set_override(config, variation.key, value)
            try:
                entries.append(Entry(model, value, parse(config)))
            except UserError as error:
                raise UserError(f"{model.label}: {error}") from error
    return entries


def find_eval(config: RunConfig, label: str) -> tuple[str, EvalData]:
    """Finds the evaluation that a comparison reads: "test", or else the first of the head.

    Returns:
        Its name and data.

    Raises:
        UserError: The config has none.
    """
    classified = [name for name, entry in config.evals.items() if entry.type == "classify"]
    if not classified:
        raise UserError(
            f"{label} must have an evaluation of the head in config.evals, got "
            f"{', '.join(config.evals) or 'none'}. Add evals(test={{'split': 'test'}})."
        )
    name = "test" if "test" in classified else classified[0]
    entry = config.evals[name]
    return name, EvalData(entry.dataset or config.dataset.name, entry.split)


def find_eval_data(entries: Sequence[Entry]) -> EvalData | None:
    """Returns the evaluation data of all configs; None if no config is compared.

    Raises:
        UserError: Configs are trained or evaluated on different datasets.
    """
    first: tuple[str, EvalData, tuple[str, ...]] | None = None
    for entry in entries:
        if entry.config is None:
            continue
        _, data = find_eval(entry.config, entry.model.label)
        mixed = [
            part.dataset or entry.config.dataset.name for part in entry.config.mixture.values()
        ]
        trained = tuple(mixed or [entry.config.dataset.name])
        if first is None:
            first = entry.title, data, trained
        label, first_data, first_trained = first
        if trained != first_trained:
            raise UserError(
                f"models must be trained on one dataset, got {', '.join(first_trained)} for "
                f"{label} and {', '.join(trained)} for {entry.title}."
            )
        if data != first_data:
            raise UserError(
                f"models must be evaluated on one split, got {first_data.title} for {label} and "
                f"{data.title} for {entry.title}."
            )
    return first[1] if first else None


def train_flops(
    family: ModelFamily, architecture: object, num_classes: int, config: RunConfig
) -> int:
    """Computes the model FLOPs of a run with `num_steps`: a step costs three forward passes."""
    size = (config.image_size, config.image_size)
    forward = family.forward_flops(architecture, size, num_classes)
    return 3 * forward * config.batch_size * config.num_steps


def with_num_steps(config: RunConfig, num_train: int) -> RunConfig:
    """Replaces epochs by the number of steps on `num_train` examples."""
    return dataclasses.replace(
        config, num_steps=resolve_num_steps(config, num_train), num_epochs=0.0
    )


def scale_num_steps(config: RunConfig, factor: float) -> RunConfig:
    """Multiplies the steps of a run, and of its warmup, by a factor."""
    num_steps = max(1, round(config.num_steps * factor))
    warmup_steps = min(num_steps, round(config.optimizer.warmup_steps * factor))
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup_steps)
    return dataclasses.replace(config, num_steps=num_steps, optimizer=optimizer)


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """Replaces the seed of a run."""
    return dataclasses.replace(config, seed=seed)
