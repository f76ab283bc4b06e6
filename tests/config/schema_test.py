"""Tests of the schema: declarations, dataclasses, and that every key is used."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from mixer_jax.config.config import fill_defaults, get_default
from mixer_jax.config.schema import (
    ENTRY_TYPES,
    EVAL_FIELDS,
    FIELDS,
    MIXTURE_FIELDS,
    SECTION_TYPES,
    Field,
    RunConfig,
    from_dict,
    get_field,
)
from mixer_jax.data.preprocess import train_image
from mixer_jax.errors import UserError
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.registry import FAMILIES
from tests.helpers.messages import raises

DECLARED = {
    **FIELDS,
    **{f"evals.NAME.{name}": field for name, field in EVAL_FIELDS.items()},
    **{f"mixture.NAME.{name}": field for name, field in MIXTURE_FIELDS.items()},
}


def test_fields_have_help_and_a_valid_default() -> None:
    for path, field in DECLARED.items():
        assert field.help
        assert "\n" not in field.help
        field.check(path, field.default)
        assert field.min <= field.max


def test_examples_are_valid_values_other_than_the_default() -> None:
    for path, field in DECLARED.items():
        if field.example:
            value = field.parse(path, field.example)
            field.check(path, value)
            assert value != field.default, path


def test_fields_have_the_type_of_their_annotation() -> None:
    for section in (RunConfig, *SECTION_TYPES.values(), *ENTRY_TYPES.values()):
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if "help" in field.metadata:
                hint = hints[field.name]
                literal = typing.get_origin(hint) is typing.Literal
                assert (str if literal else hint) is type(field.default), field.name


def test_check_accepts_the_limits_of_a_field() -> None:
    field = Field(float, 0.5, "a fraction", min=0, max=1)
    for value in (0.0, 1.0):
        field.check("fraction", value)
    for value in (-0.1, 1.1):
        with raises(UserError, "fraction", str(value), "0", "1"):
            field.check("fraction", value)


def test_parse_takes_the_type_of_the_field() -> None:
    assert Field(bool, False, "a switch").parse("switch", "True") is True
    assert Field(float, 0.5, "a rate").parse("rate", "3e-3") == 3e-3
    with raises(UserError, "switch", "'yes'"):
        Field(bool, False, "a switch").parse("switch", "yes")


def test_sections_are_all_fields_of_a_run() -> None:
    paths = {path.partition(".")[0] for path in FIELDS} | ENTRY_TYPES.keys()
    assert paths == {field.name for field in dataclasses.fields(RunConfig)}


def test_get_field_finds_keys_of_sections_and_entries() -> None:
    assert get_field("optimizer.b1") is FIELDS["optimizer.b1"]
    assert get_field("evals.any_name.split") is EVAL_FIELDS["split"]
    assert get_field("mixture.any_name.weight") is MIXTURE_FIELDS["weight"]
    for unknown in ("optimizer", "optimizer.b3", "evals.split.splt", "b1"):
        assert get_field(unknown) is None


def test_from_dict_of_the_defaults_is_a_default_run() -> None:
    assert from_dict(fill_defaults({})) == RunConfig()
    assert RunConfig().to_dict() == get_default().to_dict()


def test_from_dict_rejects_unknown_keys() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        from_dict(fill_defaults({"optimizer": {"learning_rat": 1.0}}))


def test_run_config_cannot_be_changed() -> None:
    config = RunConfig()
    for section in (config, config.model, config.optimizer):
        field = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, field, 1)


def test_preprocess_keys_are_the_arguments_of_train_image() -> None:
    accepted = train_image.__annotations__
    permutation = {"permute", "permute_patch_size", "permute_seed"}
    assert {key.split(".")[1] for key in FIELDS if key.startswith("preprocess.")} == (
        accepted.keys() - {"encoded", "rng", "image_size", "permutation", "out", "return"}
    ) | {"eval_crop", "eval_crop_fraction"} | permutation


def test_model_keys_are_fields_of_models() -> None:
    configs = [family.config_class for family in FAMILIES.values()]
    fields = {f.name for cls in (*configs, Execution, MlpMixer) for f in dataclasses.fields(cls)}
    keys = {key.split(".")[1] for key in FIELDS if key.startswith("model.")}
    assert keys - {"family", "variant"} <= fields


def test_every_key_is_read_by_the_code() -> None:
    used: set[str] = {field.name for field in dataclasses.fields(MlpMixer)}
    for path in Path("mixer_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.arg | ast.keyword):
                used.add(str(node.arg))
    assert [path for path in DECLARED if path.split(".")[-1] not in used] == []
