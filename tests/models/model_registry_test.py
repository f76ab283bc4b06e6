"""Tests of models by name and from configs."""

import dataclasses
import importlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.execution import Execution, check_backend, resolve_execution
from mixer_jax.models.family import ModelFamily
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import (
    FAMILIES,
    build_model,
    create_model,
    get_family,
    list_model_names,
    parse_model_name,
)
from tests.helpers.families import check_family
from tests.helpers.messages import raises

SETTINGS: dict[str, Any] = {
    "gelu": "tanh",
    "stochastic_depth": 0.0,
    "dropout": 0.0,
    "head_bias": 0.0,
    "dtype": "auto",
    "scan_unroll": -1,
    "remat": "auto",
    "backend": "auto",
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_know_whether_they_have_a_gelu(family: ModelFamily) -> None:
    fields = {field.name for field in dataclasses.fields(family.get_module_class())}
    assert family.has_gelu == ("gelu" in fields)


def test_list_models_names_every_variant() -> None:
    names = list_model_names()
    assert len(set(names)) == sum(len(family.variants) for family in FAMILIES.values())
    for name in names:
        family, variant = parse_model_name(name)
        assert variant in get_family(family).variants
        assert get_family(family).full_name(variant) == name
    assert "Mixer-B/16" in names


def test_bare_variants_are_mixers() -> None:
    assert parse_model_name("B/16") == parse_model_name("Mixer-B/16") == ("mixer", "B/16")
    assert parse_model_name("Mixer-custom") == parse_model_name("custom") == ("mixer", "custom")
    assert create_model("B/16", 7) == create_model("Mixer-B/16", 7)


@pytest.mark.parametrize("name", ["B/17", "Mixer-B/17", "ResNet-50", "b/16", ""])
def test_unknown_model_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=rf"Mixer-S/32, .*custom.* {name!r}"):
        create_model(name)


def test_custom_model_needs_the_whole_architecture() -> None:
    with pytest.raises(UserError, match="hidden_dim, tokens_mlp_dim, channels_mlp_dim"):
        create_model("custom", num_blocks=2, patch_size=4)


def test_create_model_sorts_overrides() -> None:
    model = create_model("B/16", 7, patch_size=8, dtype=jnp.bfloat16, gelu="exact")
    assert model.config == MixerConfig(12, 8, 768, 384, 3072)
    assert (model.num_classes, model.gelu) == (7, "exact")
    assert model.execution == Execution(dtype="bfloat16")
    execution = Execution(remat="full")
    model = create_model("B/16", execution=execution, scan_unroll=2)
    assert model.execution == Execution(remat="full", scan_unroll=2)


def test_build_model_resolves_auto() -> None:
    family, config = get_family("mixer"), MixerConfig(12, 8, 768, 384, 3072)
    settings = SETTINGS | {"gelu": "exact"}
    model = build_model(family, config, 7, settings, "cpu", "TPU v6 lite")
    assert (model.config, model.num_classes, model.gelu) == (config, 7, "exact")
    expected = Execution("float32", "xla", 1, "dots", target_device_kind="TPU v6 lite")
    assert model.execution == expected
    model = build_model(family, config, 7, SETTINGS | {"dtype": "bfloat16"}, "cpu")
    assert model.execution.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("platform", "settings", "scan_unroll", "remat"),
    [
        ("cpu", {}, 1, "dots"),
        ("tpu", {}, 1, "dots"),
        ("gpu", {}, 0, "none"),
        ("gpu", {"backend": "xla", "scan_unroll": 1}, 1, "dots"),
        ("gpu", {"dropout": 0.1}, 0, "none"),
        ("tpu", {"backend": "mosaic"}, 0, "none"),
        ("tpu", {"backend": "mosaic", "scan_unroll": 1}, 1, "none"),
        ("tpu", {"backend": "mosaic", "dropout": 0.1}, 1, "dots"),
        ("cpu", {"scan_unroll": 0}, 0, "none"),
        ("cpu", {"scan_unroll": 12}, 12, "none"),
        ("cpu", {"scan_unroll": 8}, 8, "dots"),
        ("cpu", {"scan_unroll": 8, "num_blocks": 8}, 8, "none"),
        ("cpu", {"remat": "full"}, 1, "full"),
        ("tpu", {"num_blocks": 0}, 0, "none"),
    ],
)
def test_resolve_execution(
    platform: str, settings: dict[str, Any], scan_unroll: int, remat: str
) -> None:
    num_blocks, backends = settings.pop("num_blocks", 12), ["triton", "mosaic"]
    resolved = resolve_execution(SETTINGS | settings, platform, num_blocks, backends)
    assert (resolved["scan_unroll"], resolved["remat"]) == (scan_unroll, remat)
    assert resolved["dtype"] == ("float32" if platform == "cpu" else "bfloat16")
    default = "triton" if platform == "gpu" else "xla"
    assert resolved["backend"] == settings.get("backend", default)


def test_check_backend() -> None:
    backends = get_family("mixer").block_backends
    check_backend("xla", "cpu", backends)
    check_backend("mosaic", "tpu", backends)
    with raises(UserError, "backend=triton", "GPU", "CPU", "xla"):
        check_backend("triton", "cpu", backends)
    with raises(UserError, "model.backend", "xla", "triton"):
        check_backend("triton", "gpu", {})


def test_auto_is_xla_without_custom_backends() -> None:
    resolved = resolve_execution(SETTINGS, "gpu", num_blocks=12, backends={})
    assert (resolved["backend"], resolved["scan_unroll"], resolved["remat"]) == ("xla", 0, "none")
    assert resolve_execution(SETTINGS, "tpu", 12, {})["backend"] == "xla"


def test_backends_can_be_imported() -> None:
    for family in FAMILIES.values():
        backends = getattr(family.get_module_class(), "block_backends", {})
        assert family.block_backends == backends
        for location in family.block_backends.values():
            module, _, name = location.partition(":")
            assert hasattr(getattr(importlib.import_module(module), name), "token_major")


def test_unsupported_attribute_is_an_error() -> None:
    fields = ["config", "num_classes", "execution"]

    class PlainFamily(type(get_family("mixer"))):  # type: ignore[misc]
        display_name = "Plain"

        def get_module_class(self) -> Any:
            return dataclasses.make_dataclass("Model", fields)

    family = PlainFamily()
    model = family.build(None, 3, dropout=0.0, gelu="tanh", execution=Execution())
    assert model.num_classes == 3
    with raises(UserError, "model.dropout", "Plain", "0.5"):
        family.build(None, 3, dropout=0.5, execution=Execution())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family_agrees_with_its_model(family: ModelFamily) -> None:
    check_family(family)


def test_planning_needs_no_jax() -> None:
    code = (
        "import sys; from mixer_jax.models import registry as r; f = r.get_family('mixer'); "
        "c = f.get_config('B/16'); f.param_shapes(c, 224, 10); f.forward_flops(c, 224, 10); "
        "f.check_image_size(c, 224, 224); r.list_model_names(); "
        f"r.resolve_execution({SETTINGS!r}, 'tpu', 12, []); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
