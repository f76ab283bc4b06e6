"""From the name of a checkpoint, whoever made it, to its weights on the host."""

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from mixer_jax.checkpoints import hub, timm_config, tree
from mixer_jax.checkpoints.formats.base import TensorFile
from mixer_jax.checkpoints.formats.npz import METADATA_SUFFIX, NpzFile
from mixer_jax.checkpoints.formats.safetensors import SafetensorsFile
from mixer_jax.checkpoints.formats.torch import TorchFile
from mixer_jax.checkpoints.layouts import TIMM, LoadedWeights, read_pretrained
from mixer_jax.checkpoints.model_info import (
    METADATA_FIELDS,
    ModelInfo,
    format_image_size,
    get_metadata,
    infer_variant,
    upgrade_metadata,
    validate_metadata,
)
from mixer_jax.checkpoints.resolve import HUB, CheckpointRef, local_copy, resolve_checkpoint
from mixer_jax.config.config import fill_defaults
from mixer_jax.data.imagenet_classes import imagenet1k_wnids
from mixer_jax.errors import UserError
from mixer_jax.models.family import CUSTOM
from mixer_jax.models.mixer_config import param_shapes
from mixer_jax.models.registry import get_family

_OPEN: dict[str, Callable[[str], TensorFile]] = {
    "npz": NpzFile,
    "safetensors": SafetensorsFile,
    "torch": TorchFile,
}
# A head trained by softmax keeps the mean of its bias, for that loss's gradients sum to zero over
# the classes. One trained by sigmoid starts at or drifts to a rare class's log-odds.
_SIGMOID_BELOW = -2.0


ImageSize = SupportsIndex | Sequence[SupportsIndex]
# Weights may be resized to at most so many bytes, where the machine's memory is not known.
_MOST_BYTES = 64 * 2**30


class PretrainedWeights(NamedTuple):
    """Weights on the host.

    Attributes:
        params: nested dictionaries of float32 NumPy arrays, as our model has them.
        model_info: what they say of themselves.
        train_config: of the run that trained them, keys that it lacks at their defaults; None:
            unknown.
        step: they were saved at; None: unknown.
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
    """Loads weights of any kind, at any image size.

    Args:
        source: as `resolve_checkpoint` takes it.
        step: which checkpoint of a run; None: the newest.
        image_size: side, or height and width, that they are wanted for, pixels; None: their own.
            Whole multiples are grown as in Appendix C, others interpolated.
        pretrain_image_size: overrides the size that they were trained at; None: as stored, or
            inferred from the number of tokens.
        class_names: in place of what they say; empty: that.
        gelu: in place of what they say or their layout tells; empty: that.
        eval_crop: likewise.

    Raises:
        UserError: an argument is wrong; there are no weights, they are damaged, or they do not tell
            all that is needed.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"source={source!r} names no weights; pass a path, a URL or hf:OWNER/NAME")
    source = os.fspath(source)
    wanted, trained = (
        parse_image_size("image_size", image_size),
        parse_image_size("pretrain_image_size", pretrain_image_size),
    )
    said = collect_overrides(class_names=class_names, gelu=gelu, eval_crop=eval_crop)
    if trained is not None:
        said["image_size"] = trained
    place = resolve_checkpoint(source, step)
    if place.format == "run":
        weights = _load_run(place)
        if trained not in (None, weights.model_info.image_size):
            size = format_image_size(weights.model_info.image_size)
            raise UserError(
                f"{source} was trained at {size}; leave out pretrain_image_size={trained}"
            )
        weights = weights._replace(model_info=dataclasses.replace(weights.model_info, **said))
        check_class_names(weights.model_info, source)
    elif place.format == "hub":
        weights = _load_file(
            hub.download(place.path), "safetensors", HUB + place.path, said, wanted
        )
    else:
        companions = (hub.CONFIG_FILE, Path(place.path).name + METADATA_SUFFIX)
        with local_copy(place.path, companions) as path:
            weights = _load_file(path, place.format, place.path, said, wanted)
    return weights if wanted is None else resize(weights, wanted)


def resize(weights: PretrainedWeights, image_size: tuple[int, int]) -> PretrainedWeights:
    """Returns the same weights for images of another height and width, pixels.

    Raises:
        UserError: a side is no multiple of the patch size, or the weights would not fit into the
            machine's memory; of a machine that does not tell, 64 GiB.
    """
    about = weights.model_info
    family = get_family(about.family)
    family.check_image_size(about.config, *image_size)
    config, method, note = family.resize_config(about.config, about.image_size, image_size)
    if method == "identity":
        return weights
    note = note.format(format_image_size(about.image_size))
    resized = dataclasses.replace(
        about,
        image_size=image_size,
        config=config,
        resize_note="; ".join(filter(None, [about.resize_note, note])),
    )
    check_fits_in_ram(resized)
    params = family.resize_params(weights.params, about.config, about.image_size, image_size)
    return weights._replace(params=params, model_info=resized)


def collect_overrides(**given: Any) -> dict[str, Any]:
    """Returns arguments as fields of `ModelInfo`, without empty ones.

    Args:
        given: fields of `METADATA_FIELDS`; names of classes may be any sequence but one text.

    Raises:
        UserError: a field has a value that it cannot have.
    """
    names = given.get("class_names")
    if isinstance(names, Iterable) and not isinstance(names, str | bytes):
        given["class_names"] = list(names)
    said = {
        name: value for name, value in given.items() if value is not None and value not in ("", [])
    }
    return validate_metadata(said, "the caller")


def replace_head(
    weights: PretrainedWeights,
    class_names: Sequence[str] | int,
    bias: float = 0.0,
    loss: str = "softmax",
) -> PretrainedWeights:
    """Returns weights with a head of zeros, as fine-tuning begins (Section 3).

    Args:
        weights: whose head, if they have one, is dropped.
        class_names: of the new head, or their number; 0: no head.
        bias: of every class.
        loss: it will be trained by.
    """
    names = () if isinstance(class_names, int) else tuple(class_names)
    count = class_names if isinstance(class_names, int) else len(names)
    params = {name: value for name, value in weights.params.items() if name != "head"}
    if count:
        kernel = np.zeros((weights.model_info.config.hidden_dim, count), np.float32)
        params["head"] = {"kernel": kernel, "bias": np.full(count, bias, np.float32)}
    about = dataclasses.replace(weights.model_info, num_classes=count, class_names=names, loss=loss)
    return weights._replace(params=params, model_info=about)


def set_class_names(
    weights: PretrainedWeights, class_names: Sequence[str], source: str
) -> PretrainedWeights:
    """Returns weights with other names for their classes.

    Args:
        weights: to name the classes of.
        class_names: a name for each.
        source: of the weights, for messages.

    Raises:
        UserError: there are more or fewer names than classes.
    """
    about = dataclasses.replace(weights.model_info, class_names=tuple(class_names))
    check_class_names(about, source)
    return weights._replace(model_info=about)


def check_class_names(about: ModelInfo, source: str) -> None:
    """Raises UserError unless every class of weights has a name, or none has."""
    if about.class_names and len(about.class_names) != about.num_classes:
        raise UserError(
            f"{source} has {about.num_classes:,} classes, and {len(about.class_names):,} names are "
            "given for them; give one name for every class"
        )


def _load_run(place: CheckpointRef) -> PretrainedWeights:
    # Imported here: orbax takes a second, which files of published weights need not pay.
    from mixer_jax.checkpoints.manager import CheckpointManager

    assert place.step is not None
    where = f"checkpoint {place.path}/checkpoints/{place.step}"
    checkpoints = CheckpointManager(place.path)
    try:
        metadata = checkpoints.metadata(place.step)
        about = ModelInfo.from_metadata(metadata, where)
        item = "ema_params" if get_metadata(metadata, "ema", where) else "params"
        rows, columns = about.grid
        shapes = param_shapes(about.config, rows * columns, about.num_classes)
        target = tree.unflatten(
            {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
        )
        params = checkpoints.restore(place.step, {item: target})[item]
    finally:
        checkpoints.close()
    config = metadata.get("config")
    return PretrainedWeights(params, about, config and fill_defaults(config), place.step)


def _load_file(
    path: str, kind: str, source: str, given: dict[str, Any], wanted: tuple[int, int] | None
) -> PretrainedWeights:
    """Loads published weights.

    Args:
        path: of a file on this machine.
        kind: of it.
        source: what a person knows it by.
        given: fields of `ModelInfo` that the caller says.
        wanted: height and width.
    """
    with _OPEN[kind](path) as file:
        read = read_pretrained(file)
        metadata = upgrade_metadata(file.said)
        _check_seen(metadata, read, source)
        said = {name: metadata[name] for name in METADATA_FIELDS if name in metadata}
        says_nothing = not said
        said = validate_metadata({name: said[name] for name in said.keys() - given.keys()}, source)
    if "image_size" in given and not matches_num_tokens(given["image_size"], read):
        raise UserError(
            f"pretrain_image_size={given['image_size']} does not fit {source}, which has "
            f"{read.num_tokens} tokens of {read.config.patch_size} px"
        )
    if read.layout is TIMM and says_nothing:
        config = hub.read_timm_config(path) or timm_config.guess_timm_config(*_names(source))
        where = f"{hub.CONFIG_FILE} of {source}"
        said = validate_metadata(timm_config.parse_timm_metadata(config, where, given), where)
        fitting = [
            size
            for size in timm_config.candidate_image_sizes(config)
            if matches_num_tokens(size, read)
        ]
        said |= {"image_size": fitting[0]} if fitting else {}
        timm_config.fold_normalization(read.params, config, where)
    said |= given
    if "class_names" not in said and read.num_classes == len(imagenet1k_wnids()):
        said["class_names"] = imagenet1k_wnids()
    defaults: dict[str, Any] = {
        "class_names": (),
        "gelu": read.layout.gelu,
        "eval_crop": read.layout.eval_crop,
        "exif_orientation": False,
        "loss": _tell_loss(read),
        "image_size": infer_image_size(read, said.get("image_size"), wanted, source),
    }
    about = ModelInfo(
        "mixer",
        infer_variant(read.config),
        read.config,
        num_classes=read.num_classes,
        **(defaults | said),
    )
    check_class_names(about, source)
    return PretrainedWeights(read.params, about)


def _names(source: str) -> tuple[str, str]:
    """Returns the names of a file and of its folder, as a person named it."""
    # Not resolved: a link may be named after the weights, and what it leads to need not be.
    path = source if "://" in source or source.startswith(HUB) else os.path.abspath(source)
    return Path(path).name, Path(path).parent.name


def _check_seen(said: dict[str, Any], read: LoadedWeights, source: str) -> None:
    """Raises UserError if what a file says of its tensors is not what they are."""
    config = dataclasses.asdict(read.config)
    seen = {"num_classes": read.num_classes, "config": config}
    # A run may have a variant's name with other widths; it says these too.
    if "config" not in said and said.get("variant") != CUSTOM:
        seen["variant"] = infer_variant(read.config)
    for name, value in seen.items():
        if name in said and said[name] != value:
            raise UserError(
                f"{source} says {name}={said[name]!r}, but its tensors are of {name}={value!r}"
            )


def _tell_loss(read: LoadedWeights) -> str:
    if not read.num_classes:
        return "softmax"
    return "sigmoid" if read.params["head"]["bias"].mean() < _SIGMOID_BELOW else "softmax"


def parse_image_size(name: str, size: Any) -> tuple[int, int] | None:
    """Returns an argument that is a size as height and width."""
    if size is None:
        return None
    try:
        given = size if isinstance(size, list | tuple) else (size, size)
        sides = [operator.index(side) for side in given]
    except TypeError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"{name}={size!r} is no size; pass a side or (height, width), whole pixels")
    return sides[0], sides[1]


def check_fits_in_ram(about: ModelInfo) -> None:
    """Raises UserError if weights are larger than the machine's memory."""
    rows, columns = about.grid
    shapes = param_shapes(about.config, rows * columns, about.num_classes)
    needed = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(np.float32).itemsize
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        most = _MOST_BYTES
    if needed > most:
        raise UserError(
            f"{about.name} would take {needed // 10**9:,} GB for its weights alone, and this "
            f"machine has {most // 10**9:,} GB; pass a smaller image_size"
        )


def matches_num_tokens(size: tuple[int, int], read: LoadedWeights) -> bool:
    """Returns whether an image of this height and width has as many tokens as weights are for."""
    patch = read.config.patch_size
    tokens = math.prod(side // patch for side in size)
    return not any(side % patch for side in size) and tokens == read.num_tokens


def infer_image_size(
    read: LoadedWeights, said: tuple[int, int] | None, wanted: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Returns the image size that published weights are for.

    Args:
        read: the weights.
        said: by their file or the caller.
        wanted: by the caller.
        source: of the weights, for messages.

    Raises:
        UserError: it cannot be told, or what is said does not fit the tokens.
    """
    patch = read.config.patch_size
    have = f"{read.num_tokens} tokens of {patch} px"
    if said is not None:
        if not matches_num_tokens(said, read):
            raise UserError(f"{source} says image_size={list(said)}, but has {have}")
        return said
    side = math.isqrt(read.num_tokens)
    square = (side * patch, side * patch) if side**2 == read.num_tokens else None
    fitting = wanted if wanted is not None and matches_num_tokens(wanted, read) else None
    if square and fitting not in (None, square):
        beside = f"{Path(source).name}{METADATA_SUFFIX}", '{"image_size": [height, width]}'
        if read.layout is TIMM:
            beside = hub.CONFIG_FILE, '{"input_size": [3, height, width]}'
        raise UserError(
            f"{source} has {have}, which may be {format_image_size(square)} or "
            f"{format_image_size(fitting)} alike; "
            "pass pretrain_image_size=(height, width) in Python, or write "
            f"{beside[1]} into {beside[0]} beside it"
        )
    size = square or fitting
    if size is None:
        raise UserError(
            f"{source} has {have}, which make no square image; pass image_size=(height, width) or "
            "pretrain_image_size=(height, width) that the weights were trained at"
        )
    return size
