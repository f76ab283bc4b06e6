"""Weights on the host: nested dictionaries of arrays, as in Flax, with a description of the model.

Does not import JAX.
"""

import dataclasses
import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.checkpoints.model_info import ModelInfo, format_image_size
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family

Tree = dict[str, Any]

# Largest weights, in bytes, on a machine that does not report its memory.
_DEFAULT_MEMORY = 64 * 2**30


class PretrainedWeights(NamedTuple):
    """Weights on the host.

    Attributes:
        params: Nested dictionaries of float32 NumPy arrays.
        model_info: Description of the model.
        train_config: Config of the run that trained them, with defaults filled in; None if unknown.
        step: Step at which they were saved; None if unknown.
        workdir: Workdir of the run, whose metrics are those of the weights; empty if unknown, or if
            the weights or their use have been changed.
    """

    params: Tree
    model_info: ModelInfo
    train_config: dict[str, Any] | None = None
    step: int | None = None
    workdir: str = ""


def flatten_params(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each leaf with its slash-separated path, such as "stem/kernel"."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten_params(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def unflatten_params(flat: dict[str, Any]) -> Tree:
    """Builds a tree from leaves by slash-separated path."""
    tree: Tree = {}
    for path, value in flat.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def params_digest(params: Tree) -> str:
    """Computes the SHA-256 digest of the paths, shapes and bytes of parameters on the host."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten_params(params)):
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def allocate_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Allocates a float32 array of zeros in separate pages of memory.

    JAX on the CPU uses it without a copy, as pages are aligned. NumPy would ask for huge pages, for
    which the system may first compact its memory: loading an L/16 then took 1.3 instead of 0.5 s of
    system time on a busy machine. Matmuls are as fast with usual pages.
    """
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32).reshape(shape)


def resize(weights: PretrainedWeights, image_size: tuple[int, int]) -> PretrainedWeights:
    """Adapts weights to another image size, height and width in pixels.

    Raises:
        UserError: A side is not a multiple of the patch size, the weights were trained on permuted
            images, or the weights do not fit in the machine's memory.
    """
    old = weights.model_info
    family = get_family(old.family)
    family.check_image_size(old.config, *image_size)
    if old.permutation is not None and image_size != old.image_size:
        raise UserError(
            f"image_size must be {format_image_size(old.image_size)} for weights that were trained "
            f"on permuted images, got {format_image_size(image_size)}. Leave image_size out."
        )
    config, method, note = family.resize_config(old.config, old.image_size, image_size)
    if method == "identity":
        resized = dataclasses.replace(old, image_size=image_size)
        return weights._replace(model_info=resized, workdir="")
    note = note.format(format_image_size(old.image_size))
    new = dataclasses.replace(
        old,
        config=config,
        image_size=image_size,
        resize_note="; ".join(filter(None, [old.resize_note, note])),
    )
    _check_fits_in_ram(new)
    params = family.resize_params(weights.params, old.config, old.image_size, image_size)
    return weights._replace(params=params, model_info=new, workdir="")


def replace_head(
    weights: PretrainedWeights,
    class_names: Sequence[str] | int,
    bias: float = 0.0,
    loss: str = "softmax",
) -> PretrainedWeights:
    """Replaces the head by a zero-initialized one, as for fine-tuning (Section 3).

    A hidden layer that belongs to the head is dropped, unless there is no new head: it is then the
    last of the features.

    Args:
        weights: Weights with or without a head.
        class_names: Names of the new head's classes, or their number; 0 means no head.
        bias: Bias of all classes.
        loss: Loss that the head will be trained with.
    """
    names = () if isinstance(class_names, int) else tuple(class_names)
    num_classes = class_names if isinstance(class_names, int) else len(names)
    old = weights.model_info
    model_info = dataclasses.replace(
        old, num_classes=num_classes, class_names=names, loss=loss, multi_label=False
    )
    params = {name: value for name, value in weights.params.items() if name != "head"}
    if num_classes:
        config = get_family(old.family).config_for_new_head(old.config)
        model_info = dataclasses.replace(model_info, config=config)
        layers = {path.partition("/")[0] for path in model_info.param_shapes()}
        params = {name: value for name, value in params.items() if name in layers}
        params["head"] = {
            "kernel": np.zeros(model_info.param_shapes()["head/kernel"], np.float32),
            "bias": np.full(num_classes, bias, np.float32),
        }
    return weights._replace(params=params, model_info=model_info, workdir="")


def has_untrained_head(params: Tree) -> bool:
    """Returns whether the kernel of the head is zero, so that all images get the same logits."""
    return "head" in params and not np.any(params["head"]["kernel"])


def check_trained_head(weights: PretrainedWeights, model: str) -> None:
    """Raises UserError, which starts with `model`, unless weights have a head that classifies."""
    if not weights.model_info.num_classes:
        problem = "have a head to classify images; this one gives features"
    elif has_untrained_head(weights.params):
        problem = (
            "have a trained head; this one's is all zeros, as in the published "
            "imagenet21k/ViT-*.npz, and gives all classes the same score"
        )
    else:
        return
    raise UserError(
        f"{model} must {problem}. Fine-tune it with --config.init_from, or probe its features with "
        "mixer_jax.transfer --suite=few_shot."
    )


def set_class_names(
    weights: PretrainedWeights, class_names: Sequence[str], source: str
) -> PretrainedWeights:
    """Replaces the names of classes of weights with a head.

    Raises:
        UserError: The number of names is not the number of classes.
    """
    model_info = dataclasses.replace(weights.model_info, class_names=tuple(class_names))
    check_class_names(model_info, source)
    return weights._replace(model_info=model_info)


def check_class_names(model_info: ModelInfo, source: str) -> None:
    """Raises UserError unless there is one name per class, or none."""
    num_names = len(model_info.class_names)
    if num_names not in (0, model_info.num_classes):
        raise UserError(
            f"class_names of {source} must have one name for each of its "
            f"{model_info.num_classes:,} classes, got {num_names:,} names."
        )


def _check_fits_in_ram(model_info: ModelInfo) -> None:
    """Raises UserError if the weights are larger than the machine's memory."""
    num_params = sum(map(math.prod, model_info.param_shapes().values()))
    needed = num_params * np.dtype(np.float32).itemsize
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        memory = _DEFAULT_MEMORY
    if needed > memory:
        raise UserError(
            f"image_size is too large: the weights of {model_info.name} take "
            f"{needed // 10**9:,} GB, and this machine has {memory // 10**9:,} GB of memory."
        )
