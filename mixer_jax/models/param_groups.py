"""Parameters by layer: which are frozen, and factors of the learning rate. Does not import JAX.

Layers have dotted names, such as "stem", "blocks.3" and "block1.unit01". So have parameters, such
as "blocks.3.LayerNorm_0.scale", which is a part of the stacked array blocks/LayerNorm_0/scale.
"""

import fnmatch
import itertools
import math
from collections.abc import Sequence
from typing import Any

from mixer_jax.errors import UserError, suggest
from mixer_jax.models.family import ModelFamily, Path


def frozen_blocks(
    patterns: Sequence[str], family: ModelFamily, architecture: Any, path: Path
) -> list[bool]:
    """Returns whether a parameter is frozen, for each block of a stack, or once without a stack.

    A pattern matches a parameter if it matches its name or the name of a layer that contains it,
    with or without the index of the block. An asterisk also stands for dots.
    """
    without_index = _prefixes(".".join(path))
    return [
        any(
            fnmatch.fnmatchcase(prefix, pattern.replace("/", "."))
            for pattern in patterns
            for prefix in (*without_index, *_prefixes(name))
        )
        for name in _block_names(family, architecture, path)
    ]


def check_freeze(
    patterns: Sequence[str], family: ModelFamily, architecture: Any, image_size: int
) -> None:
    """Checks patterns of frozen parameters.

    Raises:
        UserError: A pattern matches no parameter, or the patterns match all.
    """
    if not patterns:
        return
    paths = [tuple(path.split("/")) for path in family.param_shapes(architecture, image_size, 1)]

    def list_frozen(patterns: Sequence[str]) -> list[bool]:
        frozen = (frozen_blocks(patterns, family, architecture, path) for path in paths)
        return list(itertools.chain.from_iterable(frozen))

    names = (name for path in paths for name in _block_names(family, architecture, path))
    known = dict.fromkeys(prefix for name in names for prefix in _prefixes(name))
    layers = f"Layers are {_format_layers(family, architecture, paths)}."
    for pattern in patterns:
        if not any(list_frozen([pattern])):
            raise UserError(
                f"config.optimizer.freeze must match parameters of the model, got {pattern!r}. "
                f"{layers}{suggest(pattern, known)}"
            )
    if all(list_frozen(patterns)):
        raise UserError(
            "config.optimizer.freeze must leave parameters to train, got "
            f"{','.join(patterns)!r}. {layers}"
        )


def count_frozen(
    patterns: Sequence[str],
    family: ModelFamily,
    architecture: Any,
    image_size: int,
    num_classes: int,
) -> int:
    """Counts the frozen parameters of a model."""
    total = 0
    for path, shape in family.param_shapes(architecture, image_size, num_classes).items():
        frozen = frozen_blocks(patterns, family, architecture, tuple(path.split("/")))
        total += math.prod(shape) // len(frozen) * sum(frozen)
    return total


def layer_factors(decay: float, family: ModelFamily, architecture: Any) -> dict[str, float]:
    """Computes the factor of the learning rate of each layer, from the input to the head.

    The factor is 1 for the head, and is multiplied by `decay` from each layer to the one before it,
    as in BEiT's code (arXiv 2106.08254) and timm.
    """
    layers = list(family.layer_groups(architecture))
    return {layer: decay ** (len(layers) - 1 - depth) for depth, layer in enumerate(layers)}


def learning_rate_factors(
    decay: float, family: ModelFamily, architecture: Any, path: Path
) -> list[float]:
    """Returns the factor for a parameter, for each block of a stack, or once without a stack."""
    factors = layer_factors(decay, family, architecture)
    groups = family.layer_groups(architecture)
    return [
        next(
            factors[layer]
            for layer, modules in groups.items()
            if not set(modules).isdisjoint(_prefixes(name))
        )
        for name in _block_names(family, architecture, path)
    ]


def _block_names(family: ModelFamily, architecture: Any, path: Path) -> list[str]:
    """Returns the name of a parameter; of a stacked one, the name in each block."""
    if not family.is_stacked(path):
        return [".".join(path)]
    stack, *rest = path
    return [".".join((stack, str(i), *rest)) for i in range(family.num_blocks(architecture))]


def _prefixes(name: str) -> tuple[str, ...]:
    """Returns the names of the layers that contain a parameter, and its own name."""
    return tuple(itertools.accumulate(name.split("."), lambda layer, part: f"{layer}.{part}"))


def _format_layers(family: ModelFamily, architecture: Any, paths: Sequence[Path]) -> str:
    stacks = {path[0] for path in paths if family.is_stacked(path)}
    last = family.num_blocks(architecture) - 1
    modules = dict.fromkeys(path[0] for path in paths)
    return ", ".join(f"{m}.0 to {m}.{last}" if m in stacks else m for m in modules)
