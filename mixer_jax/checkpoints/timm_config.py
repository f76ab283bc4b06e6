"""What timm's config.json says of weights: how images are prepared, their size, GELU, classes."""

from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from mixer_jax.checkpoints import tree
from mixer_jax.errors import UserError

# timm crops the centre of an image whose shorter side is the model's side over this.
_CROP = 0.875
_CROP_MODE = "center"
_INTERPOLATIONS = ("bicubic", "bilinear")
# Its names of layers, and ours.
_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}
_CHANNELS = 3
# Weights of this origin are for pixels in [0, 1]; their file's name says so, where no config does.
_MIIL = "miil"
# In the name of a file that names a model, and not only what it holds.
_MODEL = "mixer"
MIIL_CONFIG = {"interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}


def parse_timm_metadata(
    config: dict[str, Any], where: str, given: Container[str]
) -> dict[str, Any]:
    """Returns what a config says of the fields of `About` that do not depend on the tensors.

    Args:
        config: of timm, or {}.
        where: it comes from, for messages.
        given: fields to leave out, for the caller says them.

    Raises:
        UserError: it asks for a crop or an activation that is not known here.
    """
    readers = {"class_names": _class_names, "eval_crop": _eval_crop, "gelu": _gelu}
    said = {name: read(config, where) for name, read in readers.items() if name not in given}
    return {name: value for name, value in said.items() if value}


def candidate_image_sizes(config: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields the heights and widths that a config tells of, the likeliest first.

    Older versions of timm leave the size of the published weights in the config of others.

    Args:
        config: of timm, or {}.
    """
    made = _model_args(config).get("img_size")
    prepared = _settings(config).get("input_size")
    sizes = [[made, made] if isinstance(made, int) else made]
    # Channels come first.
    sizes.append(prepared[1:] if isinstance(prepared, list) else None)
    for size in sizes:
        pair = size if isinstance(size, list) and len(size) == 2 else [0, 0]
        if all(type(side) is int and side > 0 for side in pair):
            yield pair[0], pair[1]


def _class_names(config: dict[str, Any], where: str) -> Any:
    settings = _settings(config)
    names = settings.get("label_names", config.get("label_names"))
    if isinstance(names, dict):
        # By the number of the class, which JSON has made a text.
        names = [names.get(str(label)) for label in range(len(names))]
    return names


def _eval_crop(config: dict[str, Any], where: str) -> Any:
    settings = _settings(config)
    crop, interpolation = settings.get("crop_pct"), settings.get("interpolation")
    mode = settings.get("crop_mode")
    if (
        crop not in (None, _CROP)
        or mode not in (None, _CROP_MODE)
        or interpolation not in (None, *_INTERPOLATIONS)
    ):
        raise UserError(
            f"{where} asks for crop_pct={crop}, crop_mode={mode!r} and interpolation="
            f"{interpolation!r}; known are {_CROP} and {_CROP_MODE} with "
            f"{' or '.join(_INTERPOLATIONS)}: pass another eval_crop"
        )
    return interpolation


def _gelu(config: dict[str, Any], where: str) -> str | None:
    layer = _model_args(config).get("act_layer")
    if layer is None:
        return None
    # timm does not mind capitals either.
    gelu = _GELUS.get(str(layer).lower())
    if gelu is None:
        raise UserError(
            f"{where} says act_layer={layer!r}; known are {' and '.join(_GELUS)}: pass a gelu"
        )
    return gelu


def guess_timm_config(file_name: str, folder_name: str) -> dict[str, Any]:
    """Returns the config of a file that has none beside it, from its name.

    Args:
        file_name: of the weights.
        folder_name: that they lie in; it tells where the file's own name names no model.
    """
    name = file_name if _MODEL in file_name.lower() else f"{folder_name}/{file_name}"
    return MIIL_CONFIG if _MIIL in name.lower() else {}


def fold_normalization(params: tree.Tree, config: dict[str, Any], where: str) -> None:
    """Changes a stem for pixels of another mean and deviation into one for pixels in [-1, 1].

    Ours are x, timm's ((x + 1) / 2 − mean) / std: the stem is linear and does that by itself. For
    timm's usual 0.5 and 0.5 nothing changes.

    Args:
        params: our tree, changed in place.
        config: of timm, or {}.
        where: it comes from, for messages.

    Raises:
        UserError: mean or deviation are not three numbers.
    """
    settings = _settings(config)
    mean, std = settings.get("mean", [0.5] * 3), settings.get("std", [0.5] * 3)
    try:
        shift, scale = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        valid = shift.shape == scale.shape == (_CHANNELS,) and bool(
            np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0).all()
        )
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"{where} says mean={mean!r} and std={std!r}; they are three numbers each")
    if (shift == 0.5).all() and (scale == 0.5).all():
        return
    stem = params["stem"]
    kernel = stem["kernel"].astype(np.float64)
    offset = (0.5 - shift) / scale
    stem["bias"] = (stem["bias"] + np.einsum("hwic,i->c", kernel, offset)).astype(np.float32)
    stem["kernel"] = (kernel * (0.5 / scale)[:, None]).astype(np.float32)


def _model_args(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what timm makes the model with, where it is not as by name."""
    arguments = config.get("model_args")
    return arguments if isinstance(arguments, dict) else {}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("pretrained_cfg", config)
    return inner if isinstance(inner, dict) else {}
