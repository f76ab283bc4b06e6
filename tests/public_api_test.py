"""Tests of the names in `mixer_jax`."""

import pytest

import mixer_jax
from mixer_jax.models.mixer_config import VARIANTS


def test_public_names_exist_and_are_listed() -> None:
    for name in mixer_jax.__all__:
        assert getattr(mixer_jax, name) is not None
        assert name in dir(mixer_jax)


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="create_modle"):
        mixer_jax.create_modle  # noqa: B018


def test_list_models_has_the_papers_models() -> None:
    assert {f"Mixer-{variant}" for variant in VARIANTS} <= set(mixer_jax.list_models())
    model = mixer_jax.create_model("Mixer-S/32", num_classes=3)
    assert model.num_classes == 3
