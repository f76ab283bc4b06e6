"""Model families by name. Does not import JAX until a model is built."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mixer_jax.errors import UserError
from mixer_jax.models.bit_family import BitFamily
from mixer_jax.models.execution import AUTO, Execution, default_dtype, resolve_execution
from mixer_jax.models.family import CUSTOM, ModelFamily
from mixer_jax.models.mixer_family import MixerFamily
from mixer_jax.models.vit_family import VitFamily

if TYPE_CHECKING:
    import flax.linen as nn
    import jax.numpy as jnp

FAMILIES: dict[str, ModelFamily] = {
    family.name: family for family in (MixerFamily(), VitFamily(), BitFamily())
}
DEFAULT_FAMILY = "mixer"


def get_family(name: str) -> ModelFamily:
    """Returns the model family of this name; raises UserError if there is none."""
    if name not in FAMILIES:
        raise UserError(f"model.family must be one of {', '.join(FAMILIES)}, got {name!r}.")
    return FAMILIES[name]


def list_model_names() -> list[str]:
    """Returns the full names of all variants of all families, e.g. "Mixer-B/16"."""
    return [f.full_name(variant) for f in FAMILIES.values() for variant in f.variants]


def parse_model_name(name: str) -> tuple[str, str]:
    """Splits a model's name into family and variant: "Mixer-B/16" is ("mixer", "B/16").

    A bare variant, such as "B/16" or "custom", is a Mixer.

    Raises:
        UserError: No such model exists.
    """
    for family in FAMILIES.values():
        prefix = f"{family.display_name}-"
        if name.startswith(prefix):
            variant = name.removeprefix(prefix)
            if variant == CUSTOM or variant in family.variants:
                return family.name, variant
    if name == CUSTOM or name in FAMILIES[DEFAULT_FAMILY].variants:
        return DEFAULT_FAMILY, name
    names = ", ".join([*list_model_names(), CUSTOM])
    raise UserError(f"model must be one of {names}, got {name!r}.")


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> "nn.Module":
    """Creates a model by name, e.g. `create_model("Mixer-B/16", num_classes=10)`.

    Args:
        name: One of `mixer_jax.list_models()`; a bare variant such as "B/16" for Mixer; or
            "custom", which needs every field of the architecture config as an override.
        num_classes: Outputs of the head; 0 returns features.
        **overrides: Fields of the architecture config, such as `patch_size`; fields of `Execution`,
            such as `dtype`, or `execution` as a whole; any other attribute of the module, such as
            `stochastic_depth`.

    Raises:
        UserError: The model is unknown or its architecture is incomplete.
    """
    family_name, variant = parse_model_name(name)
    family = get_family(family_name)
    config = family.get_config(variant, **_take_fields(family.config_class, overrides))
    fields = _take_fields(Execution, overrides)
    overrides["execution"] = dataclasses.replace(overrides.get("execution", Execution()), **fields)
    return family.build(config, num_classes, **overrides)


def build_model(
    family: ModelFamily,
    config: Any,
    num_classes: int,
    settings: Mapping[str, Any],
    platform: str,
    target_device_kind: str = "",
) -> "nn.Module":
    """Builds a model, resolving every `auto` setting.

    Args:
        family: Model family.
        config: Architecture config.
        num_classes: Outputs of the head.
        settings: `dtype`, `backend`, `scan_unroll` and `remat`, each of which may be `auto`, and
            attributes of the module.
        platform: Platform of the device, as JAX names it: cpu, gpu or tpu.
        target_device_kind: Device to compile for, as JAX names it; empty: the first one here.
    """
    num_blocks, backends = family.num_blocks(config), family.block_backends
    attributes = resolve_execution(settings, platform, num_blocks, backends)
    fields = _take_fields(Execution, attributes)
    execution = Execution(**fields, target_device_kind=target_device_kind)
    return family.build(config, num_classes, execution=execution, **attributes)


def resolve_dtype(name: str) -> "jnp.dtype":
    """Returns a dtype by name; "auto" is bfloat16 on accelerators and float32 on CPUs."""
    import jax
    import jax.numpy as jnp

    return jnp.dtype(default_dtype(jax.default_backend()) if name == AUTO else name)


def _take_fields(dataclass: type, values: dict[str, Any]) -> dict[str, Any]:
    """Removes the fields of a dataclass from `values` and returns them."""
    names = [f.name for f in dataclasses.fields(dataclass)]
    return {name: values.pop(name) for name in names if name in values}
