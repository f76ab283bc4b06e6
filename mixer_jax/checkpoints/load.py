"""Loading of weights of any format into host memory, at any image size."""

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from mixer_jax.checkpoints import hub, tree
from mixer_jax.checkpoints.formats.base import TensorFile
from mixer_jax.checkpoints.formats.npz import METADATA_SUFFIX, NpzFile
from mixer_jax.checkpoints.formats.safetensors import SafetensorsFile
from mixer_jax.checkpoints.formats.torch import TorchFile
from mixer_jax.checkpoints.layouts import LoadedWeights, read_pretrained
from mixer_jax.checkpoints.model_info import (
    METADATA_FIELDS,
    ModelInfo,
    format_image_size,
    get_metadata,
    upgrade_metadata,
    validate_metadata,
)
from mixer_jax.checkpoints.resolve import HUB, RUN, CheckpointRef, local_copy, resolve_checkpoint
from mixer_jax.config.config import fill_defaults
from mixer_jax.data.imagenet_classes import imagenet1k_wnids
from mixer_jax.errors import UserError
from mixer_jax.models.family import CUSTOM
from mixer_jax.models.registry import get_family

ImageSize = SupportsIndex | Sequence[SupportsIndex]

_OPEN: dict[str, Callable[[str], TensorFile]] = {
    "npz": NpzFile,
    "safetensors": SafetensorsFile,
    "torch": TorchFile,
}
# Mean bias of a head below which it was trained with the sigmoid loss. Softmax keeps the mean, as
# its gradients sum to zero over classes. Sigmoid starts at, or drifts to, the log-odds of a rare
# class.
_SIGMOID_MEAN_BIAS = -2.0
# Largest weights, in bytes, on a machine that does not report its memory.
_DEFAULT_MEMORY = 64 * 2**30


class PretrainedWeights(NamedTuple):
    """Weights on the host.

    Attributes:
        params: Nested dictionaries of float32 NumPy arrays.
        model_info: Description of the model.
        train_config: Config of the run that trained them, with defaults filled in; None if unknown.
        step: Step at which they were saved; None if unknown.
    """

    params: tree.Tree
    model_info: ModelInfo
    train_config: dict[str, Any] | None = None
    step: int | None = None


def load_checkpoint(
    source: str | os.PathLike,
    *,
    step: int | None = None,
    image_size: ImageSize | None = None,
    pretrain_image_size: ImageSize | None = None,
    class_names: Sequence[str] = (),
    gelu: str = "",
    eval_crop: str = "",
) -> PretrainedWeights:
    """Loads weights of any format, at any image size.

    Args:
        source: Name of the checkpoint; see `resolve_checkpoint`.
        step: Step of a run's checkpoint; None: the newest.
        image_size: Image size to resize the weights to, in pixels: a side, or height and width.
            Weights are tiled for integer multiples (Appendix C) and interpolated for others. None:
            no resizing.
        pretrain_image_size: Overrides the image size that the weights were trained at. None: as
            stored, or inferred from the number of tokens.
        class_names: Overrides the checkpoint's names; empty keeps them.
        gelu: Overrides the checkpoint's GELU; empty keeps it.
        eval_crop: Overrides the checkpoint's crop; empty keeps it.

    Raises:
        UserError: An argument is invalid, or the weights do not exist, are damaged, or lack
            something needed to use them.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"source must be a path, a URL or hf:OWNER/NAME, got {source!r}.")
    source = os.fspath(source)
    requested_size = parse_image_size("image_size", image_size)
    pretrain_size = parse_image_size("pretrain_image_size", pretrain_image_size)
    overrides = collect_overrides(class_names=class_names, gelu=gelu, eval_crop=eval_crop)
    if pretrain_size is not None:
        overrides["image_size"] = pretrain_size
    ref = resolve_checkpoint(source, step)
    if ref.format == RUN:
        weights = _load_run(ref, overrides)
    elif ref.format == "hub":
        path = hub.download(ref.path)
        weights = _load_file(path, "safetensors", HUB + ref.path, overrides, requested_size)
    else:
        sidecars = (hub.CONFIG_FILE, Path(ref.path).name + METADATA_SUFFIX)
        with local_copy(ref.path, sidecars) as path:
            weights = _load_file(path, ref.format, ref.path, overrides, requested_size)
    return weights if requested_size is None else resize(weights, requested_size)


def resize(weights: PretrainedWeights, image_size: tuple[int, int]) -> PretrainedWeights:
    """Adapts weights to another image size, height and width in pixels.

    Raises:
        UserError: A side is not a multiple of the patch size, or the weights do not fit in the
            machine's memory.
    """
    old = weights.model_info
    family = get_family(old.family)
    family.check_image_size(old.config, *image_size)
    config, method, note = family.resize_config(old.config, old.image_size, image_size)
    if method == "identity":
        return weights._replace(model_info=dataclasses.replace(old, image_size=image_size))
    note = note.format(format_image_size(old.image_size))
    new = dataclasses.replace(
        old,
        config=config,
        image_size=image_size,
        resize_note="; ".join(filter(None, [old.resize_note, note])),
    )
    check_fits_in_ram(new)
    params = family.resize_params(weights.params, old.config, old.image_size, image_size)
    return weights._replace(params=params, model_info=new)


def replace_head(
    weights: PretrainedWeights,
    class_names: Sequence[str] | int,
    bias: float = 0.0,
    loss: str = "softmax",
) -> PretrainedWeights:
    """Replaces the head by a zero-initialized one, as for fine-tuning (Section 3).

    Args:
        weights: Weights with or without a head.
        class_names: Names of the new head's classes, or their number; 0 means no head.
        bias: Bias of all classes.
        loss: Loss that the head will be trained with.
    """
    names = () if isinstance(class_names, int) else tuple(class_names)
    num_classes = class_names if isinstance(class_names, int) else len(names)
    model_info = dataclasses.replace(
        weights.model_info, num_classes=num_classes, class_names=names, loss=loss
    )
    params = {name: value for name, value in weights.params.items() if name != "head"}
    if num_classes:
        shape = _param_shapes(model_info)["head/kernel"]
        params["head"] = {
            "kernel": np.zeros(shape, np.float32),
            "bias": np.full(num_classes, bias, np.float32),
        }
    return weights._replace(params=params, model_info=model_info)


def set_class_names(
    weights: PretrainedWeights, class_names: Sequence[str], source: str
) -> PretrainedWeights:
    """Replaces the names of classes.

    Args:
        weights: Weights with a head.
        class_names: One name per class.
        source: Name of the checkpoint for messages.

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


def collect_overrides(**arguments: Any) -> dict[str, Any]:
    """Collects arguments of a function that override fields of `ModelInfo`.

    Args:
        **arguments: Fields of `METADATA_FIELDS`; None, "" and empty sequences are dropped. Class
            names can be in any iterable.

    Raises:
        UserError: A field has an invalid value.
    """
    names = arguments.get("class_names")
    if isinstance(names, Iterable) and not isinstance(names, str | bytes):
        arguments["class_names"] = list(names)
    fields = {
        name: value
        for name, value in arguments.items()
        if value is not None and value not in ("", [])
    }
    return validate_metadata(fields)


def parse_image_size(name: str, size: Any) -> tuple[int, int] | None:
    """Parses an image size given as one side or as height and width; None stays None.

    Args:
        name: Name of the argument for messages.
        size: Value of the argument.

    Raises:
        UserError: It is neither.
    """
    if size is None:
        return None
    try:
        pair = size if isinstance(size, list | tuple) else (size, size)
        lengths = [operator.index(length) for length in pair]
    except TypeError:
        lengths = []
    if len(lengths) != 2 or min(lengths) < 1:
        raise UserError(f"{name} must be a side or (height, width) in pixels, got {size!r}.")
    return lengths[0], lengths[1]


def check_fits_in_ram(model_info: ModelInfo) -> None:
    """Raises UserError if the weights are larger than the machine's memory."""
    family = get_family(model_info.family)
    num_params = family.num_params(model_info.config, model_info.image_size, model_info.num_classes)
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


def _param_shapes(model_info: ModelInfo) -> dict[str, tuple[int, ...]]:
    family = get_family(model_info.family)
    return family.param_shapes(model_info.config, model_info.image_size, model_info.num_classes)


def _load_run(ref: CheckpointRef, overrides: dict[str, Any]) -> PretrainedWeights:
    # Imported here: the import of orbax takes a second that files of weights need not.
    from mixer_jax.checkpoints.manager import CheckpointManager

    assert ref.step is not None
    source = f"checkpoint {ref.path}/checkpoints/{ref.step}"
    checkpoints = CheckpointManager(ref.path)
    try:
        metadata = checkpoints.metadata(ref.step)
        model_info = ModelInfo.from_metadata(metadata, source)
        item = "ema_params" if get_metadata(metadata, "ema", source) else "params"
        shapes = _param_shapes(model_info)
        target = tree.unflatten(
            {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
        )
        params = checkpoints.restore(ref.step, {item: target})[item]
    finally:
        checkpoints.close()
    if overrides.get("image_size", model_info.image_size) != model_info.image_size:
        raise UserError(
            f"pretrain_image_size of {source} must be omitted or "
            f"{format_image_size(model_info.image_size)}, got {overrides['image_size']}."
        )
    model_info = dataclasses.replace(model_info, **overrides)
    check_class_names(model_info, source)
    config = metadata.get("config")
    return PretrainedWeights(params, model_info, config and fill_defaults(config), ref.step)


def _load_file(
    path: str,
    format: str,
    source: str,
    overrides: dict[str, Any],
    requested_size: tuple[int, int] | None,
) -> PretrainedWeights:
    """Loads a file of weights.

    Args:
        path: Local path.
        format: Format of the file.
        source: Name of the checkpoint for messages.
        overrides: Fields of `ModelInfo` set by the caller.
        requested_size: Image size that the weights will be resized to.
    """
    with _OPEN[format](path) as file:
        loaded = read_pretrained(file)
        metadata = upgrade_metadata(file.metadata)
    _check_metadata(metadata, loaded, source)
    fields = {name: metadata[name] for name in METADATA_FIELDS if name in metadata}
    has_metadata = bool(fields)
    fields = validate_metadata(
        {name: value for name, value in fields.items() if name not in overrides}, source
    )
    if "image_size" in overrides and not _matches_num_tokens(overrides["image_size"], loaded):
        raise UserError(
            f"pretrain_image_size must match {_describe_tokens(source, loaded)}, got "
            f"{overrides['image_size']}."
        )
    if loaded.layout.name == "timm" and not has_metadata:
        fields = _read_timm_fields(path, source, loaded, overrides)
    fields |= overrides
    if "class_names" not in fields and loaded.num_classes == len(imagenet1k_wnids()):
        fields["class_names"] = imagenet1k_wnids()
    defaults: dict[str, Any] = {
        "class_names": (),
        "gelu": loaded.layout.gelu,
        "eval_crop": loaded.layout.eval_crop,
        "exif_orientation": False,
        "loss": _infer_loss(loaded),
        "image_size": _infer_image_size(loaded, fields.get("image_size"), requested_size, source),
    }
    model_info = ModelInfo(
        loaded.family,
        get_family(loaded.family).infer_variant(loaded.config),
        loaded.config,
        num_classes=loaded.num_classes,
        **(defaults | fields),
    )
    check_class_names(model_info, source)
    return PretrainedWeights(loaded.params, model_info)


def _read_timm_fields(
    path: str, source: str, loaded: LoadedWeights, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Reads fields of `ModelInfo` from timm's config, and folds its normalization into the stem."""
    config = hub.read_timm_config(path) or hub.guess_timm_config(*_file_and_folder(source))
    config_source = f"{hub.CONFIG_FILE} of {source}"
    fields = validate_metadata(
        hub.parse_timm_metadata(config, config_source, overrides), config_source
    )
    for size in hub.candidate_image_sizes(config):
        if _matches_num_tokens(size, loaded):
            fields["image_size"] = size
            break
    stem = loaded.params[get_family(loaded.family).stem]
    hub.fold_normalization(stem, config, config_source)
    return fields


def _file_and_folder(source: str) -> tuple[str, str]:
    """Returns the names of a file and of its folder, as the user wrote them."""
    # Links are not resolved: their names can be more telling than those of their targets.
    path = source if "://" in source or source.startswith(HUB) else os.path.abspath(source)
    return Path(path).name, Path(path).parent.name


def _check_metadata(metadata: dict[str, Any], loaded: LoadedWeights, source: str) -> None:
    """Raises UserError if a file's metadata contradicts its tensors."""
    inferred = {
        "family": loaded.family,
        "config": dataclasses.asdict(loaded.config),
        "num_classes": loaded.num_classes,
    }
    # A run can have a variant's name with another config, which it then stores.
    if "config" not in metadata and metadata.get("variant") != CUSTOM:
        inferred["variant"] = get_family(loaded.family).infer_variant(loaded.config)
    for name, value in inferred.items():
        if name in metadata and metadata[name] != value:
            raise UserError(
                f"{source}: {name} must be {value!r}, as its tensors are, got {metadata[name]!r}."
            )


def _infer_loss(loaded: LoadedWeights) -> str:
    if not loaded.num_classes:
        return "softmax"
    mean_bias = loaded.params["head"]["bias"].mean()
    return "sigmoid" if mean_bias < _SIGMOID_MEAN_BIAS else "softmax"


def _matches_num_tokens(size: tuple[int, int], loaded: LoadedWeights) -> bool:
    """Returns whether the weights fit images of this size."""
    multiple = _size_multiple(loaded)
    num_tokens = math.prod(length // multiple for length in size)
    is_valid = not any(length % multiple for length in size)
    return is_valid and loaded.num_tokens in (0, num_tokens)


def _size_multiple(loaded: LoadedWeights) -> int:
    return get_family(loaded.family).image_size_multiple(loaded.config)


def _describe_tokens(source: str, loaded: LoadedWeights) -> str:
    if not loaded.num_tokens:
        return f"{source}, whose image sizes are multiples of {_size_multiple(loaded)} px"
    return f"{source}, which has {loaded.num_tokens} tokens of {_size_multiple(loaded)} px"


def _infer_image_size(
    loaded: LoadedWeights,
    stored: tuple[int, int] | None,
    requested: tuple[int, int] | None,
    source: str,
) -> tuple[int, int]:
    """Infers the image size that weights were trained at.

    Args:
        loaded: Weights.
        stored: Image size in the metadata or set by the caller.
        requested: Image size that the weights will be resized to.
        source: Name of the checkpoint for messages.

    Raises:
        UserError: The image size is ambiguous, or the stored one does not match the tokens.
    """
    tokens = _describe_tokens(source, loaded)
    if stored is not None:
        if not _matches_num_tokens(stored, loaded):
            raise UserError(f"image_size must match {tokens}, got {list(stored)}.")
        return stored
    if not loaded.num_tokens:
        return requested or (get_family(loaded.family).default_image_size,) * 2
    multiple, side = _size_multiple(loaded), math.isqrt(loaded.num_tokens)
    square = (side * multiple, side * multiple) if side**2 == loaded.num_tokens else None
    if requested is not None and not _matches_num_tokens(requested, loaded):
        requested = None
    if square and requested not in (None, square):
        entry, file = '"image_size": [height, width]', f"{Path(source).name}{METADATA_SUFFIX}"
        if loaded.layout.name == "timm":
            entry, file = '"input_size": [3, height, width]', hub.CONFIG_FILE
        raise UserError(
            f"image size is ambiguous for {tokens}: {format_image_size(square)} or "
            f"{format_image_size(requested)}. Set pretrain_image_size=(height, width) in Python, "
            f"or write {{{entry}}} to {file} next to the weights."
        )
    size = square or requested
    if size is None:
        raise UserError(
            f"image size is unknown for {tokens}, which is not a square. Set image_size or "
            "pretrain_image_size to the (height, width) that the weights were trained at."
        )
    return size
