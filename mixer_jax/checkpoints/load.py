"""Loading of weights of any format into host memory, at any image size."""

import dataclasses
import logging
import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from mixer_jax.checkpoints.best import Step
from mixer_jax.checkpoints.formats import READERS
from mixer_jax.checkpoints.layouts import LoadedWeights, read_pretrained
from mixer_jax.checkpoints.model_info import (
    METADATA_FIELDS,
    ModelInfo,
    format_image_size,
    get_metadata,
    upgrade_metadata,
    validate_metadata,
)
from mixer_jax.checkpoints.resolve import (
    CHECKPOINT_DIR,
    COPY,
    FORMATS,
    HUB,
    METADATA_SUFFIX,
    RUN,
    TIMM_CONFIG_FILE,
    CheckpointRef,
    local_copy,
    local_workdir,
    pin_revision,
    resolve_checkpoint,
)
from mixer_jax.checkpoints.timm_config import (
    candidate_image_sizes,
    fold_normalization,
    parse_timm_fields,
    read_timm_config,
    recorded_config,
)
from mixer_jax.checkpoints.weights import (
    PretrainedWeights,
    check_class_names,
    has_untrained_head,
    resize,
    unflatten_params,
)
from mixer_jax.config.config import fill_defaults
from mixer_jax.config.schema import FIELDS
from mixer_jax.data.wordnet import imagenet_wnids
from mixer_jax.errors import UserError
from mixer_jax.models.family import CUSTOM
from mixer_jax.models.registry import get_family

ImageSize = SupportsIndex | Sequence[SupportsIndex]

# Mean bias of a head below which it was trained with the sigmoid loss. Softmax keeps the mean, as
# its gradients sum to zero over classes. Sigmoid starts at, or drifts to, the log-odds of a rare
# class.
_SIGMOID_MEAN_BIAS = -2.0


def load_checkpoint(
    source: str | os.PathLike,
    *,
    step: Step | None = None,
    image_size: ImageSize | None = None,
    pretrain_image_size: ImageSize | None = None,
    class_names: Sequence[str] = (),
    gelu: str = "",
    eval_crop: str = "",
    eval_crop_fraction: float | None = None,
) -> PretrainedWeights:
    """Loads weights of any format, at any image size.

    All hosts must call it together, because a run's checkpoint is restored by a collective.

    Args:
        source: Name of the checkpoint; see `resolve_checkpoint`.
        step: Step of a run's checkpoint, or "best" by its `checkpoint.best_metric`; None: the
            newest.
        image_size: Image size to resize the weights to, in pixels: a side, or height and width.
            Weights are tiled for integer multiples (Appendix C) and interpolated for others. None:
            no resizing.
        pretrain_image_size: Overrides the image size that the weights were trained at. None: as
            stored, or inferred from the number of tokens.
        class_names: Overrides the checkpoint's names; empty keeps them.
        gelu: Overrides the checkpoint's GELU; empty keeps it.
        eval_crop: Overrides the checkpoint's crop; empty keeps it.
        eval_crop_fraction: Overrides the crop's side, as a fraction of the resized image's; None
            keeps it, or with another `eval_crop` takes the default.

    Raises:
        UserError: An argument is invalid, or the weights do not exist, are damaged, or lack
            something needed to use them.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"source must be a path, a URL or hf:OWNER/NAME, got {source!r}.")
    requested_size = parse_image_size("image_size", image_size)
    pretrain_size = parse_image_size("pretrain_image_size", pretrain_image_size)
    if eval_crop and eval_crop_fraction is None:
        eval_crop_fraction = FIELDS["preprocess.eval_crop_fraction"].default
    overrides = collect_overrides(
        class_names=class_names,
        gelu=gelu,
        eval_crop=eval_crop,
        eval_crop_fraction=eval_crop_fraction,
    )
    if pretrain_size is not None:
        overrides["image_size"] = pretrain_size
    with _quiet_orbax():
        ref = resolve_checkpoint(os.fspath(source), step)
        if ref.format in (RUN, COPY):
            with local_workdir(ref) as (workdir, saved_step):
                weights = _load_run(ref, workdir, saved_step, overrides)
        else:
            with _name_errors(os.fspath(source), ref), local_copy(ref) as path:
                weights = _load_file(path, ref, overrides, requested_size)
    return weights if requested_size is None else resize(weights, requested_size)


def pin_checkpoint(source: str) -> tuple[str, int | None]:
    """Returns the arguments `source` and `step` with which every host loads the same weights.

    The newest step of a run, and the commit that a revision on the Hub stands for, could change
    between the calls of two hosts.

    Raises:
        UserError: No such checkpoint exists.
    """
    ref = resolve_checkpoint(source)
    if ref.format == "hub":
        with _name_errors(source, ref):
            return HUB + pin_revision(ref.path), None
    return source, ref.step if ref.format == RUN else None


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops orbax's warnings, which concern neither the weights nor anything a user can change."""

    def is_other(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextmanager
def _name_errors(source: str, ref: CheckpointRef) -> Iterator[None]:
    """Adds to errors that a name was taken for one on the Hub because no such file exists."""
    try:
        yield
    except UserError as error:
        if ref.format != "hub" or source != ref.path:
            raise
        raise UserError(f"{source!r} is neither a file nor a folder, and {error}") from error


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

    Raises:
        UserError: It is neither; the message starts with `name`.
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


def _load_run(
    ref: CheckpointRef, workdir: str, step: int, overrides: dict[str, Any]
) -> PretrainedWeights:
    # Imported here: the import of orbax takes a second that files of weights need not.
    from mixer_jax.checkpoints.manager import CheckpointManager

    folder = ref.path if ref.format == COPY else f"{ref.path}/{CHECKPOINT_DIR}/{step}"
    source = f"checkpoint {folder}"
    checkpoints = CheckpointManager(workdir)
    try:
        metadata = checkpoints.metadata(step)
        model_info = ModelInfo.from_metadata(metadata, source)
        item = "ema_params" if get_metadata(metadata, "ema", source) else "params"
        shapes = model_info.param_shapes()
        target = _allocate(shapes, source)
        params = checkpoints.restore(step, {item: target})[item]
    finally:
        checkpoints.close()
    if overrides.get("image_size", model_info.image_size) != model_info.image_size:
        raise UserError(
            f"pretrain_image_size of {source} must be omitted or "
            f"{format_image_size(model_info.image_size)}, got {overrides['image_size']}."
        )
    # Class names alone change no metric.
    is_as_trained = not any(
        name != "class_names" and value != getattr(model_info, name)
        for name, value in overrides.items()
    )
    model_info = dataclasses.replace(model_info, **overrides)
    check_class_names(model_info, source)
    config = metadata.get("config")
    return PretrainedWeights(
        params,
        model_info,
        config and fill_defaults(config),
        ref.step,
        ref.path if ref.format == RUN and is_as_trained else "",
    )


def _allocate(shapes: dict[str, tuple[int, ...]], source: str) -> Any:
    """Allocates parameters; raises UserError if metadata claims more than there is memory for."""
    try:
        return unflatten_params(
            {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
        )
    except (MemoryError, ValueError) as error:
        count = sum(map(math.prod, shapes.values()))
        raise UserError(
            f"{source} needs memory for {count:,} parameters, which this machine does not have."
        ) from error


def _load_file(
    path: str,
    ref: CheckpointRef,
    overrides: dict[str, Any],
    requested_size: tuple[int, int] | None,
) -> PretrainedWeights:
    """Loads a file whose local path is `path`, to be resized to `requested_size`."""
    is_on_hub = ref.format == "hub"
    source = HUB + ref.path if is_on_hub else ref.path
    format = FORMATS[Path(path).suffix] if is_on_hub else ref.format
    with READERS[format](path) as file:
        metadata = upgrade_metadata(file.metadata)
        recorded = metadata.get("config")
        if recorded is None and format != "npz":
            recorded = recorded_config(read_timm_config(path, source))
        loaded = read_pretrained(file, recorded if isinstance(recorded, dict) else {})
    _check_metadata(metadata, loaded, source)
    fields = validate_metadata(
        {name: value for name, value in metadata.items() if name not in overrides}, source
    )
    if loaded.layout.name == "timm" and metadata.keys().isdisjoint(METADATA_FIELDS):
        fields = _read_timm_fields(path, source, loaded, overrides)
    fields |= overrides
    if "class_names" not in fields:
        fields["class_names"] = imagenet_wnids(loaded.num_classes)
    if "image_size" not in fields:
        fields["image_size"] = _infer_image_size(loaded, requested_size, source)
    elif not loaded.fits_image_size(fields["image_size"]):
        name = "pretrain_image_size" if "image_size" in overrides else "image_size"
        raise UserError(
            f"{name} must match {_describe_tokens(source, loaded)}, got {fields['image_size']}."
        )
    defaults: dict[str, Any] = {
        "gelu": loaded.layout.gelu,
        "eval_crop": loaded.layout.eval_crop,
        # Metadata of older versions has no fraction, and this one.
        "eval_crop_fraction": FIELDS["preprocess.eval_crop_fraction"].default
        if "eval_crop" in metadata
        else loaded.layout.eval_crop_fraction(fields["image_size"]),
        "exif_orientation": False,
        "loss": _infer_loss(loaded),
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


def _read_timm_fields(
    path: str, source: str, loaded: LoadedWeights, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Reads fields of `ModelInfo` from timm's config, and folds its normalization into the stem."""
    config = read_timm_config(path, source)
    config_source = f"{TIMM_CONFIG_FILE} of {source}"
    fields = validate_metadata(parse_timm_fields(config, config_source, overrides), config_source)
    for size in candidate_image_sizes(config):
        if loaded.fits_image_size(size):
            fields["image_size"] = size
            break
    stem = get_family(loaded.family).stem
    fold_normalization(loaded.params[stem] if stem else None, config, config_source)
    return fields


def _infer_loss(loaded: LoadedWeights) -> str:
    if not loaded.num_classes:
        return "softmax"
    if has_untrained_head(loaded.params):
        # Published i21k ViTs, whose head the authors zeroed, were trained with the sigmoid loss.
        return "sigmoid"
    mean_bias = loaded.params["head"]["bias"].mean()
    return "sigmoid" if mean_bias < _SIGMOID_MEAN_BIAS else "softmax"


def _infer_image_size(
    loaded: LoadedWeights, requested: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Infers the image size that weights were trained at, if it is stored nowhere.

    Raises:
        UserError: The image size is ambiguous.
    """
    if not loaded.num_tokens:
        return requested or (get_family(loaded.family).default_image_size,) * 2
    tokens = _describe_tokens(source, loaded)
    side = math.isqrt(loaded.num_tokens)
    length = side * loaded.size_multiple
    square = (length, length) if side**2 == loaded.num_tokens else None
    if requested is not None and not loaded.fits_image_size(requested):
        requested = None
    if square and requested not in (None, square):
        entry, file = '"image_size": [height, width]', f"{Path(source).name}{METADATA_SUFFIX}"
        if loaded.layout.name == "timm":
            entry, file = '"input_size": [3, height, width]', TIMM_CONFIG_FILE
        raise UserError(
            f"image size is ambiguous for {tokens}: {format_image_size(square)} or "
            f"{format_image_size(requested)}. Set pretrain_image_size=(height, width) in Python, "
            f"or write {{{entry}}} to {file} next to the weights."
        )
    size = square or requested
    if size is None:
        note = ""
        if math.isqrt(loaded.num_tokens + 1) ** 2 == loaded.num_tokens + 1:
            note = " Weights whose class token has no position embedding (timm's no_embed_class) "
            note += "are not supported."
        raise UserError(
            f"image size is unknown for {tokens}, which is not a square. Set image_size or "
            f"pretrain_image_size to the (height, width) that the weights were trained at.{note}"
        )
    return size


def _describe_tokens(source: str, loaded: LoadedWeights) -> str:
    if not loaded.num_tokens:
        return f"{source}, whose image sizes are multiples of {loaded.size_multiple} px"
    return f"{source}, which has {loaded.num_tokens} tokens of {loaded.size_multiple} px"
