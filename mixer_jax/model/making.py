"""From names and settings to a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mixer_jax.errors import UserError
from mixer_jax.model.defaults import AUTO, default_dtype, settled
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.model.variants import resolve_widths


def create_model(variant: str, num_classes: int = 1000, **overrides: Any) -> MlpMixer:
    """Returns a Mixer by name, e.g. `create_model("B/16", num_classes=10)`.

    Args:
        variant: a name of `VARIANTS`, or "custom" with all five widths as overrides.
        num_classes: outputs of the head; 0 gives features.
        **overrides: any attribute of `MlpMixer`, the widths of `variants.Widths` among them.

    Raises:
        UserError: the variant is unknown or a custom width is missing.
    """
    names = ("num_blocks", "patch_size", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    widths = resolve_widths(variant, **{k: overrides.pop(k) for k in names if k in overrides})
    return MlpMixer(num_classes=num_classes, **dataclasses.asdict(widths), **overrides)


def build_model(section: dict[str, Any], num_classes: int, device_kind: str = "") -> MlpMixer:
    """Returns the model of a configuration's model section.

    Args:
        section: the keys under `model` in keys.py.
        num_classes: outputs of the head.
        device_kind: of the devices, as JAX names it; empty: of the first one here.
    """
    settings = settled(section, jax.default_backend()) | {"device_kind": device_kind}
    settings["dtype"] = jnp.dtype(settings["dtype"])
    settings.pop("family", None)
    settings["kernels"], settings["unroll"] = settings.pop("backend"), settings.pop("scan_unroll")
    return create_model(settings.pop("variant"), num_classes, **settings)


def resolve_dtype(name: str) -> Any:
    """Returns the type of that name; "auto" is bfloat16 on accelerators and float32 on the CPU."""
    if name == AUTO:
        name = default_dtype(jax.default_backend())
    return jnp.dtype(name)


def check_kernels(kernels: str, platform: str) -> None:
    """Raises UserError unless kernels run on devices of that platform."""
    if (needed := {"triton": "gpu", "mosaic": "tpu"}.get(kernels, platform)) != platform:
        raise UserError(
            f"model.backend={kernels} is for a {needed.upper()}, and the devices are "
            f"{platform.upper()}s; set auto or xla"
        )


def for_devices(model: MlpMixer, count: int) -> MlpMixer:
    """Returns a model that can be compiled for images that lie over so many devices.

    Kernels take the images of one; the compiler divides only what it computes itself.
    """
    return model if count == 1 else model.clone(kernels="xla")
