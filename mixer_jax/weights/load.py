"""From the name of a checkpoint, whoever made it, to its weights on the host."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.config import with_defaults
from mixer_jax.data.wordnet import imagenet_names
from mixer_jax.errors import UserError
from mixer_jax.model.resolution import method, resize_tokens, resized_tokens_mlp_dim
from mixer_jax.model.variants import check_image_size, parameter_shapes
from mixer_jax.weights import hub, timm_config, tree
from mixer_jax.weights.about import About, check_said, format_size, from_json, name_variant
from mixer_jax.weights.npz_file import SAID_SUFFIX, NpzFile
from mixer_jax.weights.places import HUB, Place, find_weights, local_copy
from mixer_jax.weights.published import TIMM, Read, read_published
from mixer_jax.weights.safetensors_file import SafetensorsFile
from mixer_jax.weights.tensor_file import TensorFile
from mixer_jax.weights.torch_file import TorchFile

ImageSize = int | tuple[int, int]

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
    source: str,
    *,
    step: int | None = None,
    image_size: ImageSize | None = None,
    gelu: str = "",
    eval_crop: str = "",
) -> Weights:
    """Loads weights of any kind, at any image size.

    Args:
        source: as `find_weights` takes it.
        step: which checkpoint of a run; None: the newest.
        image_size: side, or height and width, that they are wanted for, pixels; None: their own.
            Whole multiples are grown as in Appendix C, others interpolated.
        gelu: in place of what they say or their layout tells; empty: that.
        eval_crop: likewise.

    Raises:
        UserError: there are none, they are damaged, or they do not tell all that is needed.
    """
    place = find_weights(source, step)
    wanted = _as_pair(image_size)
    given = {"gelu": gelu, "eval_crop": eval_crop}
    said = check_said({name: value for name, value in given.items() if value}, "the caller")
    if place.kind == "run":
        weights = _load_run(place)
        weights = weights._replace(about=dataclasses.replace(weights.about, **said))
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
        UserError: a side is no multiple of the patch size.
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
    params = resize_tokens(weights.params, about.grid, resized.grid)
    return weights._replace(params=params, about=resized)


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


def _as_pair(image_size: ImageSize | None) -> tuple[int, int] | None:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _load_run(place: Place) -> Weights:
    # Imported here: orbax takes a second, which files of published weights need not pay.
    from mixer_jax.weights.checkpoint import Checkpoints

    assert place.step is not None
    checkpoints = Checkpoints(place.path)
    try:
        metadata = checkpoints.metadata(place.step)
        where = f"checkpoint {place.path}/checkpoints/{place.step}"
        about = from_json(metadata.get("about", {}), where)
        rows, columns = about.grid
        shapes = parameter_shapes(about.widths, rows * columns, about.num_classes)
        target = tree.build({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
        item = "ema_params" if metadata["ema"] else "params"
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
        said = check_said(file.said, source)
    if read.layout is TIMM and not said:
        config = hub.read_config(path) or timm_config.guess(Path(source).name)
        where = f"{hub.CONFIG_FILE} of {source}"
        said = timm_config.read_said(config, where, crop_given="eval_crop" in given)
        said = check_said(said, where)
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
        "image_size": _tell_image_size(read, said.get("image_size"), wanted, source),
    }
    about = About(
        name_variant(read.widths), read.widths, num_classes=read.num_classes, **(defaults | said)
    )
    check_names(about, source)
    return Weights(read.params, about)


def _tell_loss(read: Read) -> str:
    if not read.num_classes:
        return "softmax"
    return "sigmoid" if read.params["head"]["bias"].mean() < _SIGMOID_BELOW else "softmax"


def _tell_image_size(
    read: Read, said: tuple[int, int] | None, wanted: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Returns the image size that published weights are for."""
    patch = read.widths.patch_size

    def fits(size: tuple[int, int] | None) -> bool:
        if size is None or any(side % patch for side in size):
            return False
        return math.prod(side // patch for side in size) == read.num_tokens

    if said is not None and not fits(said):
        raise UserError(
            f"{source} says image_size={list(said)}, but has {read.num_tokens} tokens of {patch} px"
        )
    side = math.isqrt(read.num_tokens)
    if said is None and side**2 == read.num_tokens:
        return side * patch, side * patch
    size = said if said is not None else wanted
    if size is None or not fits(size):
        raise UserError(
            f"{source} has {read.num_tokens} tokens of {patch} px, which make no square image; "
            "pass image_size=(height, width) that the weights were trained at"
        )
    return size
