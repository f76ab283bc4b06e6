"""Placeholder datasets with the number of examples and classes of a run, but no images."""

import dataclasses
import re

from mixer_jax.config.schema import RunConfig
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.models.execution import resolve_execution
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import RunDatasets

# Classes and training examples, from TFDS.
_KNOWN_DATASETS = {
    "imagenet2012": (1_000, 1_281_167),
    "cifar10": (10, 50_000),
    "cifar100": (100, 50_000),
    "digits/all": (10, 1_437),
    "digits/low": (5, 708),
    "digits/high": (5, 729),
}
_SPLIT = re.compile(r"train(?:\[(\d*)(%?):(\d*)(%?)\])?")


def placeholder_datasets(config: RunConfig) -> RunDatasets:
    """Creates datasets with the number of examples and classes in a config.

    Raises:
        UserError: The config leaves a number open, and the dataset is not a known one.
    """
    dataset = config.dataset
    num_classes, num_examples = dataset.num_classes, dataset.num_examples
    known = _KNOWN_DATASETS.get(dataset.name)
    if known is not None:
        num_classes = num_classes or known[0]
        num_examples = num_examples or _count_examples(dataset.train_split, known[1])
    for key, value in (("num_classes", num_classes), ("num_examples", num_examples)):
        if not value:
            raise UserError(
                f"config.dataset.{key} must be set, because planning does not read "
                f"{dataset.name!r}, got 0. Set it, for example --config.dataset.{key}=1000."
            )
    class_names = tuple(map(str, range(num_classes)))
    return RunDatasets(Source(dataset.name, range(num_examples), class_names), {}, {})


def resolve_for_platform(config: RunConfig, platform: str) -> RunConfig:
    """Returns a copy of a config with every `auto` setting resolved for an accelerator.

    Args:
        config: Run to plan.
        platform: Platform of the devices, as JAX names it.

    Raises:
        UserError: The architecture is that of a checkpoint, which planning does not read.
    """
    if config.model.variant == INIT_FROM:
        raise UserError(
            "config.model.variant must name an architecture, because planning does not read "
            f"checkpoints, got {INIT_FROM!r}. Set it, for example --config.model.variant=B/16."
        )
    model, family = config.model, get_family(config.model.family)
    num_blocks = family.num_blocks(model.architecture)
    resolved = resolve_execution(model.settings, platform, num_blocks, family.block_backends)
    model = dataclasses.replace(model, **resolved)
    return dataclasses.replace(config, model=model, compilation_cache="")


def _count_examples(split: str, total: int) -> int:
    """Returns the number of examples of a split such as "train[:99%]"; 0 if it is not known."""
    match = _SPLIT.fullmatch(split.replace(" ", ""))
    if not match:
        return 0
    start, start_percent, stop, stop_percent = match.groups()
    bounds = [
        round(int(text) / 100 * total) if percent else int(text)
        for text, percent in ((start or "0", start_percent), (stop or f"{total}", stop_percent))
    ]
    return max(0, min(bounds[1], total) - bounds[0])
