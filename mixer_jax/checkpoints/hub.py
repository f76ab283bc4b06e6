"""Hugging Face Hub, and timm's config.json: preprocessing, image size, GELU and class names."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.checkpoints.model_info import read_metadata_json
from mixer_jax.checkpoints.resolve import HUB, HUB_FILE
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.models.registry import FAMILIES

CONFIG_FILE = "config.json"

# timm resizes the shorter side of an image to the model's size divided by crop_pct, then crops the
# center.
_CROP_PCT = 0.875
_CROP_MODE = "center"
_INTERPOLATIONS = ("bicubic", "bilinear")
# Our names of timm's activation layers.
_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}
# Weights with this tag expect pixels in [0, 1]. It is in the file's name if there is no config.
_MIIL = "miil"
MIIL_CONFIG = {"interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}


def download(name: str) -> str:
    """Downloads a repository's weights and config into the local cache; returns the weights' path.

    Cached files are used without asking the Hub.

    Args:
        name: "OWNER/NAME" or "OWNER/NAME@REVISION".

    Raises:
        UserError: The repository or one of the files does not exist, or cannot be downloaded.
    """
    # Imported here: the import takes half a second that local files need not.
    import huggingface_hub
    from huggingface_hub import errors

    # It would report each retry on standard error.
    huggingface_hub.logging.set_verbosity_error()
    repo, _, revision = name.partition("@")

    def get_files(local_files_only: bool) -> str:
        paths = [
            huggingface_hub.hf_hub_download(
                repo, file, revision=revision or None, local_files_only=local_files_only
            )
            for file in (CONFIG_FILE, HUB_FILE)
        ]
        return paths[-1]

    try:
        try:
            return get_files(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            # Both are requested again, so that they are of the same revision.
            return get_files(local_files_only=False)
    except errors.HFValidationError as error:
        raise UserError(
            f"checkpoint on the Hub must be {HUB}OWNER/NAME, got {HUB + name!r}."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{HUB}{name} is not in the local cache, and the Hub cannot be reached. Download its "
            f"{HUB_FILE} and {CONFIG_FILE} elsewhere, and pass the folder that contains them."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{HUB}{name} does not exist, or is private. Check the name.") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{HUB}{name} must contain {HUB_FILE} and {CONFIG_FILE}.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{HUB}{name} cannot be downloaded: {summarize_error(error)}.") from error


def read_timm_config(weights_path: str) -> dict[str, Any]:
    """Reads timm's config next to a file of weights; returns {} if there is none.

    Raises:
        UserError: It is not a JSON object.
    """
    return read_metadata_json(Path(weights_path).with_name(CONFIG_FILE))


def guess_timm_config(file_name: str, folder_name: str) -> dict[str, Any]:
    """Guesses the config of a file that has none, from its name.

    Args:
        file_name: Name of the file of weights.
        folder_name: Name of its folder, which counts if the file's own name is generic.
    """
    is_generic = not any(family in file_name.lower() for family in FAMILIES)
    name = f"{folder_name}/{file_name}" if is_generic else file_name
    return MIIL_CONFIG if _MIIL in name.lower() else {}


def parse_timm_metadata(
    config: dict[str, Any], source: str, overrides: Container[str]
) -> dict[str, Any]:
    """Extracts the fields of `ModelInfo` that do not depend on the tensors.

    Args:
        config: timm's config, or {}.
        source: Name of the config for messages.
        overrides: Fields to skip, because the caller sets them.

    Raises:
        UserError: The config has a crop or an activation that is not supported.
    """
    parsers = {"class_names": _class_names, "eval_crop": _eval_crop, "gelu": _gelu}
    fields = {
        name: parse(config, source) for name, parse in parsers.items() if name not in overrides
    }
    return {name: value for name, value in fields.items() if value}


def candidate_image_sizes(config: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields the image sizes in a config, height and width, the most reliable first.

    When timm saves fine-tuned weights, old versions leave the original `input_size` in the config.

    Args:
        config: timm's config, or {}.
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


def fold_normalization(stem: dict[str, Any], config: dict[str, Any], source: str) -> None:
    """Folds timm's normalization of pixels into the stem.

    Our models see pixels x in [-1, 1], timm's ((x + 1) / 2 − mean) / std. The stem is linear, so an
    adapted stem gives the same result. timm's usual mean and std of 0.5 change nothing.

    Args:
        stem: Kernel (height, width, 3, channels) and bias, changed in place.
        config: timm's config, or {}.
        source: Name of the config for messages.

    Raises:
        UserError: Mean or std is not three numbers.
    """
    settings = _pretrained_cfg(config)
    values = {name: settings.get(name, [0.5] * 3) for name in ("mean", "std")}
    try:
        mean, std = (np.asarray(value, np.float64) for value in values.values())
        is_valid = mean.shape == std.shape == (3,) and bool(
            np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()
        )
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{source}: mean and std must be three numbers each, with std > 0, got "
            f"mean={values['mean']!r} and std={values['std']!r}."
        )
    if (mean == 0.5).all() and (std == 0.5).all():
        return
    kernel = stem["kernel"].astype(np.float64)
    offset = (0.5 - mean) / std
    stem["bias"] = (stem["bias"] + np.einsum("hwic,i->c", kernel, offset)).astype(np.float32)
    stem["kernel"] = (kernel * (0.5 / std)[:, None]).astype(np.float32)


def _class_names(config: dict[str, Any], source: str) -> Any:
    names = _pretrained_cfg(config).get("label_names", config.get("label_names"))
    if isinstance(names, dict):
        # By class index, which is a string in JSON.
        names = [names.get(str(index)) for index in range(len(names))]
    return names


def _eval_crop(config: dict[str, Any], source: str) -> Any:
    settings = _pretrained_cfg(config)
    crop_pct, mode = settings.get("crop_pct"), settings.get("crop_mode")
    interpolation = settings.get("interpolation")
    if (
        crop_pct not in (None, _CROP_PCT)
        or mode not in (None, _CROP_MODE)
        or interpolation not in (None, *_INTERPOLATIONS)
    ):
        raise UserError(
            f"{source}: crop_pct must be {_CROP_PCT}, crop_mode {_CROP_MODE}, and interpolation "
            f"{' or '.join(_INTERPOLATIONS)}, got crop_pct={crop_pct}, crop_mode={mode!r} and "
            f"interpolation={interpolation!r}. Set eval_crop to use another crop."
        )
    return interpolation


def _gelu(config: dict[str, Any], source: str) -> str | None:
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
