"""From the name of a checkpoint, whoever made it, to its weights on the host."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.config import with_defaults
from mixer_jax.data.wordnet import imagenet_names
from mixer_jax.errors import UserError
from mixer_jax.model.resolution import method, resize_tokens, resized_tokens_mlp_dim
from mixer_jax.model.variants import CUSTOM, check_image_size, parameter_shapes
from mixer_jax.weights import hub, timm_config, tree
from mixer_jax.weights.about import (
    SAYABLE,
    About,
    check_said,
    format_size,
    from_metadata,
    metadata_entry,
    name_variant,
)
from mixer_jax.weights.npz_file import SAID_SUFFIX, NpzFile
from mixer_jax.weights.places import HUB, Place, find_weights, local_copy
from mixer_jax.weights.published import TIMM, Read, read_published
from mixer_jax.weights.safetensors_file import SafetensorsFile
from mixer_jax.weights.sizes import ImageSize, as_pair, check_memory, fits, tell_image_size
from mixer_jax.weights.tensor_file import TensorFile
from mixer_jax.weights.torch_file import TorchFile

_OPEN: dict[str, Callable[[str], TensorFile]] = {
    "npz": NpzFile,
    "safetensors": SafetensorsFile,
    "torch": TorchFile,
}
# A head trained by softmax keeps the mean of its bias, for that loss's gradients sum to zero over
# the classes. One trained by sigmoid starts at or drifts to a rare class's log-odds.
_SIGMOID_BELOW = -2.0


class Weights(NamedTuple):
    """Weights on the host.

    Attributes:
        params: nested dictionaries of float32 NumPy arrays, as our model has them.
        about: what they say of themselves.
        config: of the run that trained them, keys that it lacks at their defaults; None: unknown.
        step: they were saved at; None: unknown.
    """

    params: tree.Tree
    about: About
    config: dict[str, Any] | None = None
    step: int | None = None


def load_weights(
    source: str | os.PathLike,
    *,
    step: int | None = None,
    image_size: ImageSize | None = None,
    trained_size: ImageSize | None = None,
    class_names: Sequence[str] = (),
    gelu: str = "",
    eval_crop: str = "",
) -> Weights:
    """Loads weights of any kind, at any image size.

    Args:
        source: as `find_weights` takes it.
        step: which checkpoint of a run; None: the newest.
        image_size: side, or height and width, that they are wanted for, pixels; None: their own.
            Whole multiples are grown as in Appendix C, others interpolated.
        trained_size: likewise, that they were trained at, in place of what they say; None: that,
            or what their tokens tell.
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
    wanted, trained = as_pair("image_size", image_size), as_pair("trained_size", trained_size)
    said = said_by_caller(class_names=class_names, gelu=gelu, eval_crop=eval_crop)
    if trained is not None:
        said["image_size"] = trained
    place = find_weights(source, step)
    if place.kind == "run":
        weights = _load_run(place)
        if trained not in (None, weights.about.image_size):
            size = format_size(weights.about.image_size)
            raise UserError(f"{source} was trained at {size}; leave out trained_size={trained}")
        weights = weights._replace(about=dataclasses.replace(weights.about, **said))
        check_names(weights.about, source)
    elif place.kind == "hub":
        weights = _load_file(hub.fetch(place.path), "safetensors", HUB + place.path, said, wanted)
    else:
        companions = (hub.CONFIG_FILE, Path(place.path).name + SAID_SUFFIX)
        with local_copy(place.path, companions) as path:
            weights = _load_file(path, place.kind, place.path, said, wanted)
    return weights if wanted is None else resize(weights, wanted)


def resize(weights: Weights, image_size: tuple[int, int]) -> Weights:
    """Returns the same weights for images of another height and width, pixels.

    Raises:
        UserError: a side is no multiple of the patch size, or the weights would not fit into the
            machine's memory; of a machine that does not tell, 64 GiB.
    """
    about = weights.about
    check_image_size(*image_size, about.widths.patch_size)
    resized = dataclasses.replace(about, image_size=image_size)
    way = method(about.grid, resized.grid)
    if way == "same":
        return weights
    size = format_size(about.image_size)
    told = {
        "grown": f"grown from {size} (the paper's Appendix C)",
        "interpolated": f"interpolated from {size}, which the paper does not do",
    }
    mlp_dim = resized_tokens_mlp_dim(about.widths.tokens_mlp_dim, about.grid, resized.grid)
    resized = dataclasses.replace(
        resized,
        widths=dataclasses.replace(about.widths, tokens_mlp_dim=mlp_dim),
        resolution="; ".join(filter(None, [about.resolution, told[way]])),
    )
    check_memory(resized)
    params = resize_tokens(weights.params, about.grid, resized.grid)
    return weights._replace(params=params, about=resized)


def said_by_caller(**given: Any) -> dict[str, Any]:
    """Returns arguments as fields of `About`, without empty ones.

    Args:
        given: fields of `SAYABLE`; names of classes may be any sequence but one text.

    Raises:
        UserError: a field has a value that it cannot have.
    """
    names = given.get("class_names")
    if isinstance(names, Iterable) and not isinstance(names, str | bytes):
        given["class_names"] = list(names)
    said = {
        name: value for name, value in given.items() if value is not None and value not in ("", [])
    }
    return check_said(said, "the caller")


def with_new_head(
    weights: Weights, class_names: Sequence[str] | int, bias: float = 0.0, loss: str = "softmax"
) -> Weights:
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
        kernel = np.zeros((weights.about.widths.hidden_dim, count), np.float32)
        params["head"] = {"kernel": kernel, "bias": np.full(count, bias, np.float32)}
    about = dataclasses.replace(weights.about, num_classes=count, class_names=names, loss=loss)
    return weights._replace(params=params, about=about)


def with_class_names(weights: Weights, class_names: Sequence[str], source: str) -> Weights:
    """Returns weights with other names for their classes.

    Args:
        weights: to name the classes of.
        class_names: a name for each.
        source: of the weights, for messages.

    Raises:
        UserError: there are more or fewer names than classes.
    """
    about = dataclasses.replace(weights.about, class_names=tuple(class_names))
    check_names(about, source)
    return weights._replace(about=about)


def check_names(about: About, source: str) -> None:
    """Raises UserError unless every class of weights has a name, or none has."""
    if about.class_names and len(about.class_names) != about.num_classes:
        raise UserError(
            f"{source} has {about.num_classes:,} classes, and {len(about.class_names):,} names are "
            "given for them; give one name for every class"
        )


def _load_run(place: Place) -> Weights:
    # Imported here: orbax takes a second, which files of published weights need not pay.
    from mixer_jax.weights.checkpoint import Checkpoints

    assert place.step is not None
    where = f"checkpoint {place.path}/checkpoints/{place.step}"
    checkpoints = Checkpoints(place.path)
    try:
        metadata = checkpoints.metadata(place.step)
        about = from_metadata(metadata, where)
        item = "ema_params" if metadata_entry(metadata, "ema", where) else "params"
        rows, columns = about.grid
        shapes = parameter_shapes(about.widths, rows * columns, about.num_classes)
        target = tree.build({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
        params = checkpoints.restore(place.step, {item: target})[item]
    finally:
        checkpoints.close()
    config = metadata.get("config")
    return Weights(params, about, config and with_defaults(config), place.step)


def _load_file(
    path: str, kind: str, source: str, given: dict[str, Any], wanted: tuple[int, int] | None
) -> Weights:
    """Loads published weights.

    Args:
        path: of a file on this machine.
        kind: of it.
        source: what a person knows it by.
        given: fields of `About` that the caller says.
        wanted: height and width.
    """
    with _OPEN[kind](path) as file:
        read = read_published(file)
        _check_seen(file.said, read, source)
        said = {name: file.said[name] for name in SAYABLE if name in file.said}
        says_nothing = not said
        said = check_said({name: said[name] for name in said.keys() - given.keys()}, source)
    if "image_size" in given and not fits(given["image_size"], read):
        raise UserError(
            f"trained_size={given['image_size']} does not fit {source}, which has "
            f"{read.num_tokens} tokens of {read.widths.patch_size} px"
        )
    if read.layout is TIMM and says_nothing:
        config = hub.read_config(path) or timm_config.guess(*_names(source))
        where = f"{hub.CONFIG_FILE} of {source}"
        said = check_said(timm_config.read_said(config, where, given), where)
        fitting = [size for size in timm_config.image_sizes(config) if fits(size, read)]
        said |= {"image_size": fitting[0]} if fitting else {}
        timm_config.fold_pixels(read.params, config, where)
    said |= given
    if "class_names" not in said and read.num_classes == len(imagenet_names()):
        said["class_names"] = imagenet_names()
    defaults: dict[str, Any] = {
        "class_names": (),
        "gelu": read.layout.gelu,
        "eval_crop": read.layout.eval_crop,
        "exif_orientation": False,
        "loss": _tell_loss(read),
        "image_size": tell_image_size(read, said.get("image_size"), wanted, source),
    }
    about = About(
        name_variant(read.widths), read.widths, num_classes=read.num_classes, **(defaults | said)
    )
    check_names(about, source)
    return Weights(read.params, about)


def _names(source: str) -> tuple[str, str]:
    """Returns the names of a file and of its folder, as a person named it."""
    # Not resolved: a link may be named after the weights, and what it leads to need not be.
    path = source if "://" in source or source.startswith(HUB) else os.path.abspath(source)
    return Path(path).name, Path(path).parent.name


def _check_seen(said: dict[str, Any], read: Read, source: str) -> None:
    """Raises UserError if what a file says of its tensors is not what they are."""
    widths = dataclasses.asdict(read.widths)
    seen = {"num_classes": read.num_classes, "widths": widths}
    # A run may have a variant's name with other widths; it says these too.
    if "widths" not in said and said.get("variant") != CUSTOM:
        seen["variant"] = name_variant(read.widths)
    for name, value in seen.items():
        if name in said and said[name] != value:
            raise UserError(
                f"{source} says {name}={said[name]!r}, but its tensors are of {name}={value!r}"
            )


def _tell_loss(read: Read) -> str:
    if not read.num_classes:
        return "softmax"
    return "sigmoid" if read.params["head"]["bias"].mean() < _SIGMOID_BELOW else "softmax"
