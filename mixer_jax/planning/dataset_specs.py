"""Data sets that are only numbers: what a run has to know of its data before it reads any."""

import re

from ml_collections import ConfigDict

from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.registry import resolve_auto
from mixer_jax.training.datasets import RunDatasets

# Classes and training images, as TFDS has them.
_KNOWN = {
    "imagenet2012": (1_000, 1_281_167),
    "cifar10": (10, 50_000),
    "cifar100": (100, 50_000),
    "digits/all": (10, 1_437),
    "digits/low": (5, 708),
    "digits/high": (5, 729),
}
_SLICE = re.compile(r"train(?:\[(\d*)(%?):(\d*)(%?)\])?")


def placeholder_datasets(config: ConfigDict) -> RunDatasets:
    """Returns sources of as many examples and classes as a config says; they hold no images.

    Raises:
        UserError: the config does not say, and the data set is none of those known by name.
    """
    dataset = config.dataset
    classes, examples = dataset.num_classes, dataset.num_examples
    known = _KNOWN.get(dataset.name)
    if known is not None:
        classes = classes or known[0]
        examples = examples or _count(dataset.train_split, known[1])
    for key, value in (("num_classes", classes), ("num_examples", examples)):
        if not value:
            raise UserError(
                f"config.dataset.{key}=0: no data are read for a plan, so say how many "
                f"{dataset.name!r} has, e.g. --config.dataset.{key}=1000"
            )
    names = tuple(map(str, range(classes)))
    return RunDatasets(Source(dataset.name, range(examples), names), {}, {})


def resolve_for_platform(config: ConfigDict, platform: str) -> ConfigDict:
    """Returns a copy of a config as an accelerator would run it, with nothing left open.

    Args:
        config: valid by `config.validate`.
        platform: of the devices, as JAX names it.

    Raises:
        UserError: its widths are those of weights, which are not read for a plan.
    """
    if config.model.variant == INIT_FROM:
        raise UserError(
            f"config.model.variant={INIT_FROM!r}: no weights are read for a plan; name the "
            "variant, e.g. --config.model.variant=B/16"
        )
    plain = config.copy_and_resolve_references()
    plain.model.update(resolve_auto(plain.model.to_dict(), platform))
    plain.compilation_cache = ""
    return plain


def _count(split: str, whole: int) -> int:
    """Returns the examples of a part of the training split such as train[:99%], 0: not known."""
    found = _SLICE.fullmatch(split.replace(" ", ""))
    if not found:
        return 0
    first, first_percent, last, last_percent = found.groups()
    ends = [
        round(int(text) / 100 * whole) if percent else int(text)
        for text, percent in ((first or "0", first_percent), (last or f"{whole}", last_percent))
    ]
    return max(0, min(ends[1], whole) - ends[0])
