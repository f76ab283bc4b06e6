"""What timm's config.json says of weights: how images are prepared, and the names of classes."""

from typing import Any

import numpy as np

from mixer_jax.errors import UserError
from mixer_jax.weights import tree

# timm crops the centre of an image whose shorter side is the model's side over this.
_CROP = 0.875
_INTERPOLATIONS = ("bicubic", "bilinear")
_CHANNELS = 3
# Weights of this origin are for pixels in [0, 1]; their file's name says so, where no config does.
_MIIL = "miil"
MIIL_CONFIG = {"interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}


def read_said(config: dict[str, Any], where: str, crop_given: bool) -> dict[str, Any]:
    """Returns what a config says of the fields of `About`.

    Args:
        config: of timm, or {}.
        where: it comes from, for messages.
        crop_given: leave out the crop, for the caller says it.

    Raises:
        UserError: it asks for a crop that is not known here.
    """
    settings = _settings(config)
    names = settings.get("label_names", config.get("label_names"))
    if isinstance(names, dict):
        # By the number of the class, which JSON has made a text.
        names = [names.get(str(label)) for label in range(len(names))]
    said = {"class_names": names} if names else {}
    if crop_given:
        return said
    crop, interpolation = settings.get("crop_pct"), settings.get("interpolation")
    if crop not in (None, _CROP) or interpolation not in (None, *_INTERPOLATIONS):
        raise UserError(
            f"{where} asks for crop_pct={crop} and interpolation={interpolation!r}; known are "
            f"{_CROP} with {' or '.join(_INTERPOLATIONS)}: pass another eval_crop"
        )
    return said | ({"eval_crop": interpolation} if interpolation else {})


def guess(file_name: str) -> dict[str, Any]:
    """Returns the config of a file that has none beside it, from its name."""
    return MIIL_CONFIG if _MIIL in file_name.lower() else {}


def fold_pixels(params: tree.Tree, config: dict[str, Any], where: str) -> None:
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


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("pretrained_cfg", config)
    return inner if isinstance(inner, dict) else {}
