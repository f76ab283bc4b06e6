"""timm's config.json: preprocessing, image size, GELU and class names of a file of weights."""

import contextlib
import json
import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.checkpoints.model_info import ModelInfo, is_crop_fraction, read_metadata_json
from mixer_jax.checkpoints.resolve import HUB, TIMM_CONFIG_FILE
from mixer_jax.errors import UserError
from mixer_jax.models.family import TimmModel
from mixer_jax.models.registry import FAMILIES, get_family

# timm resizes the shorter side of an image to the model's size divided by crop_pct, then crops the
# center.
_CROP_MODE = "center"
# Crop that resizes an image without keeping its aspect ratio.
_SQUASH = "squash"
_INTERPOLATIONS = ("bicubic", "bilinear")
# Our names of timm's activation layers.
_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}
# Weights with this tag expect pixels in [0, 1]. It is in the file's name if there is no config.
_MIIL = "miil"
_MIIL_CONFIG = {"interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}


def read_timm_config(path: str, source: str) -> dict[str, Any]:
    """Reads timm's config next to a file of weights, or guesses it from the file's name.

    Args:
        path: Local path of the weights.
        source: Their name as the user wrote it.

    Raises:
        UserError: The config is not a JSON object.
    """
    config = read_metadata_json(Path(path).with_name(TIMM_CONFIG_FILE))
    if config:
        return config
    # Links are not resolved: their names can say more about the weights than those of their
    # targets.
    name = Path(source if "://" in source or source.startswith(HUB) else os.path.abspath(source))
    is_generic = not any(family in name.name.lower() for family in FAMILIES)
    full_name = f"{name.parent.name}/{name.name}" if is_generic else name.name
    return _MIIL_CONFIG if _MIIL in full_name.lower() else {}


def make_timm_config(model_info: ModelInfo) -> dict[str, Any]:
    """Builds timm's config for weights: architecture, preprocessing and class names.

    For a model that timm cannot create by name, the architecture is our name, which timm rejects.
    """
    family = get_family(model_info.family)
    settings: dict[str, Any] = {
        "input_size": [3, *model_info.image_size],
        # timm's models of patches take images of one size.
        "fixed_input_size": family.image_size_multiple(model_info.config) > 1,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        **_crop_settings(model_info),
        "num_classes": model_info.num_classes,
    }
    layouts = family.weight_layouts()
    tensors = next((layout.tensors for layout in layouts if layout.name == "timm"), ())
    modules = {tensor.path: tensor.name.removesuffix(".weight") for tensor in tensors}
    # Layers that timm replaces for other classes or channels.
    settings |= {"first_conv": modules["stem/kernel"], "classifier": modules["head/kernel"]}
    config: dict[str, Any] = {
        "architecture": family.full_name(model_info.variant),
        "num_classes": model_info.num_classes,
        "pretrained_cfg": settings,
    }
    with contextlib.suppress(UserError):
        model = find_timm_model(model_info)
        config |= {"architecture": model.name}
        config |= {"model_args": dict(model.args)} if model.args else {}
    if model_info.class_names:
        config["label_names"] = list(model_info.class_names)
    return config


def find_timm_model(model_info: ModelInfo) -> TimmModel:
    """Finds the model of `timm.create_model` that a config can name.

    Raises:
        UserError: timm can create no such model by name.
    """
    family = get_family(model_info.family)
    if model_info.permutation:
        raise family.not_in_timm(model_info.config, "timm cannot permute pixels")
    return family.timm_model(model_info.config, model_info.gelu)


def timm_folder_code(model_info: ModelInfo, source: str) -> list[str]:
    """Returns lines of Python that load a folder of weights in timm.

    Args:
        model_info: Description of the model.
        source: Name of the folder in timm, "local-dir:PATH" or "hf-hub:OWNER/NAME".

    Raises:
        UserError: timm can create no such model by name.
    """
    model = find_timm_model(model_info)
    args = [json.dumps(source, ensure_ascii=False), "pretrained=True"]
    args += [f"{name}={value}" for name, value in model.python_args.items()]
    return ["import timm", f"model = timm.create_model({', '.join(args)}).eval()"]


def timm_expression(model_info: ModelInfo) -> str:
    """Returns a Python expression that creates timm's model of any size, after `import timm`.

    Raises:
        UserError: timm has no such model.
    """
    return get_family(model_info.family).timm_expression(
        model_info.variant,
        model_info.config,
        model_info.image_size,
        model_info.num_classes,
        model_info.gelu,
    )


def _crop_settings(model_info: ModelInfo) -> dict[str, Any]:
    """Returns timm's crop that is the most similar to a model's, and equal to bicubic and bilinear.

    The other crops average over areas, which is similar to Pillow's bilinear filter.
    """
    crop, fraction = model_info.eval_crop, model_info.eval_crop_fraction
    return {
        "interpolation": crop if crop in _INTERPOLATIONS else "bilinear",
        "crop_mode": _SQUASH if crop in ("square", "resize") else _CROP_MODE,
        "crop_pct": 1.0 if crop == "resize" else fraction,
    }


def parse_timm_fields(
    config: dict[str, Any], source: str, overrides: Container[str]
) -> dict[str, Any]:
    """Extracts the fields of `ModelInfo` that do not depend on the tensors.

    Args:
        config: timm's config, or {}.
        source: Name of the config for messages.
        overrides: Fields that the caller sets, and that are skipped.

    Raises:
        UserError: The config has a crop or an activation that is not supported.
    """
    fields: dict[str, Any] = {}
    if "class_names" not in overrides:
        fields["class_names"] = _parse_class_names(config)
    if "eval_crop" not in overrides:
        fields["eval_crop"] = _parse_eval_crop(config, source)
        fields["eval_crop_fraction"] = _pretrained_cfg(config).get("crop_pct")
    if "gelu" not in overrides:
        fields["gelu"] = _parse_gelu(config, source)
    return {name: value for name, value in fields.items() if value not in (None, "", [], ())}


def candidate_image_sizes(config: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields the image sizes in a config, height and width, the most reliable first.

    When timm saves fine-tuned weights, old versions leave the original `input_size` in the config.
    """
    img_size = _model_args(config).get("img_size")
    input_size = _pretrained_cfg(config).get("input_size")
    sizes = [[img_size, img_size] if isinstance(img_size, int) else img_size]
    sizes.append(input_size[1:] if isinstance(input_size, list) else None)  # Without channels.
    for size in sizes:
        if isinstance(size, list) and len(size) == 2:
            height, width = size
            if type(height) is type(width) is int and height > 0 and width > 0:
                yield height, width


def recorded_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns fields of the architecture that shapes may leave open, named as in timm's models."""
    return _model_args(config)


def fold_normalization(stem: dict[str, Any] | None, config: dict[str, Any], source: str) -> None:
    """Folds timm's normalization of pixels into the stem.

    Our models see pixels x in [-1, 1], timm's ((x + 1) / 2 − mean) / std. The stem is linear, so an
    adapted stem gives the same result. timm's usual mean and std of 0.5 change nothing.

    Args:
        stem: Kernel (height, width, 3, channels) and bias, changed in place; None if the model's
            stem is not linear.
        config: timm's config, or {}.
        source: Name of the config for messages.

    Raises:
        UserError: Mean or std is not three numbers, or other than 0.5 without a linear stem.
    """
    settings = _pretrained_cfg(config)
    values = {name: settings.get(name, [0.5] * 3) for name in ("mean", "std")}
    try:
        mean, std = (np.asarray(value, np.float64) for value in values.values())
        is_valid = mean.shape == std.shape == (3,) and bool(
            np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()
        )
    except (TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{source}: mean and std must be three numbers each, with std > 0, got "
            f"mean={values['mean']!r} and std={values['std']!r}."
        )
    if (mean == 0.5).all() and (std == 0.5).all():
        return
    if stem is None:
        raise UserError(
            f"{source}: mean and std must be 0.5 for this model, into whose stem no other "
            f"normalization can be folded, got mean={values['mean']!r} and std={values['std']!r}."
        )
    kernel = stem["kernel"].astype(np.float64)
    offset = (0.5 - mean) / std
    stem["bias"] = (stem["bias"] + np.einsum("hwic,i->c", kernel, offset)).astype(np.float32)
    stem["kernel"] = (kernel * (0.5 / std)[:, None]).astype(np.float32)


def _parse_class_names(config: dict[str, Any]) -> Any:
    names = _pretrained_cfg(config).get("label_names", config.get("label_names"))
    if isinstance(names, dict):
        # By class index, which is a string in JSON.
        names = [names.get(str(index)) for index in range(len(names))]
    return names


def _parse_eval_crop(config: dict[str, Any], source: str) -> Any:
    settings = _pretrained_cfg(config)
    crop_pct, mode = settings.get("crop_pct"), settings.get("crop_mode")
    interpolation = settings.get("interpolation")
    if (
        (crop_pct is not None and not is_crop_fraction(crop_pct))
        or mode not in (None, _CROP_MODE)
        or interpolation not in (None, *_INTERPOLATIONS)
    ):
        raise UserError(
            f"{source}: crop_pct must be a fraction up to 1, crop_mode {_CROP_MODE}, and "
            f"interpolation {' or '.join(_INTERPOLATIONS)}, got crop_pct={crop_pct!r}, "
            f"crop_mode={mode!r} and interpolation={interpolation!r}. Set eval_crop to use another "
            "crop."
        )
    return interpolation


def _parse_gelu(config: dict[str, Any], source: str) -> str | None:
    layer = _model_args(config).get("act_layer")
    if layer is None:
        return None
    # timm ignores case as well.
    gelu = _GELUS.get(str(layer).lower())
    if gelu is None:
        raise UserError(
            f"{source}: act_layer must be {' or '.join(_GELUS)}, got {layer!r}. Set gelu to use "
            "another one."
        )
    return gelu


def _model_args(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of timm's model that differ from those of its name."""
    args = config.get("model_args")
    return args if isinstance(args, dict) else {}


def _pretrained_cfg(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("pretrained_cfg", config)
    return inner if isinstance(inner, dict) else {}
