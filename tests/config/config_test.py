"""Tests of building, validating and parsing configurations."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.config.config import (
    fill_defaults,
    flatten,
    format_help,
    get_default,
    parse,
    resolve_num_steps,
    validate,
)
from mixer_jax.config.schema import (
    ARCHITECTURE_FIELDS,
    EVAL_FIELDS,
    FIELDS,
    MIXTURE_FIELDS,
    parse_shots,
)
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import raises


@pytest.fixture
def config() -> ConfigDict:
    config = get_default()
    config.num_steps = 20_000
    config.evals = config_lib.evals(test={"split": "test"})
    return config


def set_key(config: ConfigDict, path: str, value: Any) -> None:
    """Sets a key to a value that may have another type."""
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.unlocked(), node.ignore_type():
        node[name] = value


def test_parse_keeps_every_value(config: ConfigDict) -> None:
    config.optimizer.learning_rate = 0.5
    config.mixture = config_lib.mixture(a={"dataset": "cifar10"}, b={"weight": 2.0})
    run = parse(config)
    assert run.to_dict() == config.to_dict()
    assert run.optimizer.learning_rate == 0.5
    assert run.evals["test"].split == "test"
    assert (run.mixture["a"].dataset, run.mixture["b"].weight) == ("cifar10", 2.0)
    # Later changes of the ConfigDict do not reach it.
    config.evals.test.split = "train"
    assert run.evals["test"].split == "test"


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("seed", -1, ["seed", "0", "4294967295"]),
        ("seed", 1.5, ["seed", "integer"]),
        ("batch_size", True, ["batch_size"]),
        ("preprocess.flip", 1, ["preprocess.flip"]),
        ("dataset.name", 7, ["dataset.name"]),
        ("model.family", "resnet", ["model.family", "mixer"]),
        ("model.variant", "Q/99", ["config.model.variant", "S/32", "H/14", "custom", "init_from"]),
        ("model.variant", "b/16", ["config.model.variant", "'b/16'", "mean B/16"]),
        ("model.variant", "R50x1", ["config.model.variant", "'R50x1'", "model.family=bit"]),
        ("model.pooling", "avg", ["config.model.pooling", "'', token, gap, map", "'avg'"]),
        ("model.gelu", "relu", ["model.gelu", "tanh", "exact"]),
        ("model.dropout", 1.0, ["model.dropout", "0", "0.999"]),
        ("model.scan_unroll", 13, ["model.scan_unroll", "12"]),
        ("model.hidden_dim", -8, ["model.hidden_dim"]),
        ("image_size", 230, ["image_size", "patch_size", "16", "224", "240"]),
        ("num_steps", 0, ["num_steps", "num_epochs"]),
        ("num_steps", 99, ["optimizer.warmup_steps", "10000"]),
        ("recipe.grad_accum_steps", 3, ["batch_size", "4096"]),
        ("optimizer.learning_rate", float("nan"), ["optimizer.learning_rate"]),
        ("num_epochs", float("inf"), ["num_epochs"]),
        ("preprocess.max_shift", 224, ["preprocess.max_shift", "image_size"]),
        ("optimizer.name", "adamax", ["optimizer.name", "adamw", "sgd"]),
        ("optimizer.sam_rho", -0.1, ["optimizer.sam_rho", "0"]),
        ("optimizer.layer_decay", 0.0, ["optimizer.layer_decay", "1"]),
        ("optimizer.layer_decay", 1.5, ["optimizer.layer_decay", "1"]),
        ("optimizer.freeze", "block.1", ["optimizer.freeze", "'block.1'", "mean blocks.1"]),
        ("optimizer.freeze", "*", ["optimizer.freeze", "blocks.0", "head"]),
        ("optimizer.cooldown_steps", 5, ["optimizer.cooldown_steps", "'linear'", "rsqrt", "none"]),
        ("evals.test.every_steps", -5, ["evals.test.every_steps"]),
        ("evals.test.shots", "1,zero", ["evals.test.shots"]),
        ("checkpoint.best_metric", "top1", ["checkpoint.best_metric", "test/top1", "'top1'"]),
        (
            "checkpoint.best_metric",
            "val/top1",
            ["test/top1", "test/top5", "'val/top1'"],
        ),
        ("checkpoint.best_metric", "test/num_bad", ["test/log_likelihood", "'test/num_bad'"]),
        ("checkpoint.best_metric", "test/top1", ["evals.test.every_steps", "'test/top1'", "0"]),
        ("early_stopping_patience", 3, ["checkpoint.best_metric", "3", "test/top1"]),
        ("early_stopping_patience", -1, ["early_stopping_patience", "-1"]),
        ("early_stopping_min_delta", -0.1, ["early_stopping_min_delta", "-0.1"]),
        ("wandb", "team/mixer", ["config.wandb", "/", "WANDB_ENTITY"]),
        ("wandb", "true", ["config.wandb", "project", "true", "--config.wandb=mixer"]),
        ("wandb", True, ["config.wandb", "string"]),
        ("profile_steps", "100", ["config.profile_steps", "START:STOP"]),
        ("profile_steps", "0:5", ["config.profile_steps", "1"]),
        ("profile_steps", "105:100", ["config.profile_steps", "START", "STOP"]),
        ("profile_steps", "100:105:2", ["config.profile_steps", "START:STOP"]),
    ],
)
def test_parse_names_the_key_and_the_value(
    config: ConfigDict, path: str, value: Any, parts: list[str]
) -> None:
    set_key(config, path, value)
    with raises(UserError, str(value), *parts) as caught:
        parse(config)
    assert "\n" not in str(caught.value)


def test_parse_takes_the_metrics_of_every_kind_of_evaluation(config: ConfigDict) -> None:
    metrics = {"classify": "loss", "few_shot": "25_shot", "linear": "linear", "knn": "knn"}
    config.evals.test.every_steps = 10
    for kind, metric in metrics.items():
        config.evals.test.type = kind
        config.checkpoint.best_metric = f"test/{metric}"
        assert parse(config).checkpoint.best_metric == f"test/{metric}"
    with raises(UserError, "test/knn", "'test/25_shot'"):
        config.checkpoint.best_metric = "test/25_shot"
        parse(config)


def test_parse_limits_the_length_of_a_project(config: ConfigDict) -> None:
    config.wandb = "p" * 128
    assert parse(config).wandb == config.wandb
    config.wandb += "p"
    with raises(UserError, "config.wandb", "128", "129"):
        parse(config)


def test_cooldown_is_within_the_steps_after_warmup(config: ConfigDict) -> None:
    config.num_steps, config.optimizer.warmup_steps = 100, 40
    config.optimizer.decay_type, config.optimizer.cooldown_steps = "rsqrt", 60
    assert parse(config).optimizer.cooldown_steps == 60
    config.optimizer.cooldown_steps = 61
    with raises(UserError, "config.optimizer.cooldown_steps", "60", "61"):
        parse(config)


def test_profiled_steps_are_within_the_run(config: ConfigDict) -> None:
    config.num_steps, config.optimizer.warmup_steps = 104, 10
    config.profile_steps = "100:105"
    assert parse(config).profile_range == range(100, 105)
    config.num_steps = 103
    with raises(UserError, "config.profile_steps", "1:104", "'100:105'"):
        parse(config)


@pytest.mark.parametrize(
    "points", ["", "0.6,0.3", "0.3,0.3", "0,0.5", "0.5,1", "half", "1/0", "-1"]
)
def test_parse_needs_increasing_decay_points_for_a_staircase(
    config: ConfigDict, points: str
) -> None:
    config.optimizer.decay_type, config.optimizer.decay_points = "staircase", points
    with raises(UserError, "config.optimizer.decay_points", repr(points)):
        parse(config)


def test_parse_rejects_a_smallest_target_of_softmax(config: ConfigDict) -> None:
    config.recipe.loss, config.recipe.min_target = "softmax", 1e-4
    with raises(UserError, "config.recipe.min_target", "0.0001", "softmax"):
        parse(config)


def test_parse_rejects_a_smallest_target_with_class_weights(config: ConfigDict) -> None:
    config.recipe.class_weights, config.recipe.min_target = "balanced", 1e-4
    with raises(UserError, "config.recipe.min_target", "0.0001", "balanced"):
        parse(config)
    config.recipe.class_weights = "sqrt"
    with raises(UserError, "config.recipe.class_weights", "balanced", "sqrt"):
        parse(config)


def test_parse_rejects_images_resized_to_less_than_the_crop(config: ConfigDict) -> None:
    config.image_size, config.preprocess.resize_size = 224, 223
    with raises(UserError, "config.preprocess.resize_size", "223", "224"):
        parse(config)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_parse_needs_two_images_for_mixup_and_cutmix(config: ConfigDict, name: str) -> None:
    config.recipe[name], config.batch_size = 0.5, 1
    with raises(UserError, "batch_size", "1", "2", "mixup", "CutMix"):
        parse(config)
    config.batch_size = 2
    parse(config)


def test_parse_takes_the_architecture_of_a_checkpoint(config: ConfigDict) -> None:
    config.model.variant = "init_from"
    with raises(UserError, "config.init_from", "model.variant"):
        parse(config)
    config.init_from = "a.npz"
    # Any image size may fit.
    config.image_size = 230
    assert parse(config).model.variant == "init_from"
    config.model.hidden_dim = 8
    with raises(UserError, "model.hidden_dim", "8", "init_from"):
        parse(config)


def test_parse_rejects_unknown_keys(config: ConfigDict) -> None:
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with raises(UserError, "optimizer.learning_rat", "optimizer.learning_rate"):
        parse(config)


@pytest.mark.parametrize("path", ["seed", "optimizer.b1", "evals.test.split", "mixture"])
def test_parse_rejects_missing_keys(config: ConfigDict, path: str) -> None:
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.unlocked():
        del node[name]
    with raises(UserError, f"config.{path}"):
        parse(config)


def test_validate_raises_as_parse(config: ConfigDict) -> None:
    validate(config)
    config.image_size = 230
    with raises(UserError, "image_size", "230"):
        validate(config)


def test_evals_fills_in_defaults() -> None:
    config = config_lib.evals(
        val={"split": "validation", "every_steps": 10}, real={"dataset": "cifar10"}
    )
    defaults = {name: field.default for name, field in EVAL_FIELDS.items()}
    assert config.val.to_dict() == defaults | {"split": "validation", "every_steps": 10}
    assert config.real.to_dict() == defaults | {"dataset": "cifar10"}
    assert (defaults["type"], defaults["split"], defaults["every_steps"]) == ("classify", "test", 0)
    with raises(UserError, "evals.test.splt", "evals.test.split"):
        config_lib.evals(test={"splt": "test"})


def test_mixture_fills_in_defaults() -> None:
    config = config_lib.mixture(a={"dataset": "cifar10"})
    defaults = {name: field.default for name, field in MIXTURE_FIELDS.items()}
    assert config.a.to_dict() == defaults | {"dataset": "cifar10"}
    with raises(UserError, "mixture.a.wait", "mixture.a.weight"):
        config_lib.mixture(a={"wait": 1.0})


def test_fill_defaults_adds_missing_keys_only() -> None:
    saved: dict[str, Any] = {"seed": 3, "optimizer": {"b1": 0.5}, "evals": {"a": {"split": "x"}}}
    filled = fill_defaults(saved)
    assert saved == {"seed": 3, "optimizer": {"b1": 0.5}, "evals": {"a": {"split": "x"}}}
    assert (filled["seed"], filled["optimizer"]["b1"]) == (3, 0.5)
    assert filled["optimizer"]["b2"] == FIELDS["optimizer.b2"].default
    assert filled["evals"] == {"a": {n: f.default for n, f in EVAL_FIELDS.items()} | {"split": "x"}}
    assert "mixture" not in filled


def test_resolve_num_steps_counts_whole_batches(config: ConfigDict) -> None:
    config.num_steps, config.num_epochs, config.batch_size = 0, 300.0, 4096
    config.optimizer.warmup_steps = 1
    assert resolve_num_steps(parse(config), 1_268_355) == 92_897
    assert resolve_num_steps(dataclasses.replace(parse(config), num_epochs=0.001), 10) == 1
    config.num_steps = 10_000
    assert resolve_num_steps(parse(config), 1_268_355) == 10_000


def test_parse_resolves_the_architecture(config: ConfigDict) -> None:
    config.model.variant, config.model.hidden_dim = "B/16", 8
    model = parse(config).model
    assert model.architecture == dataclasses.replace(VARIANTS["B/16"], hidden_dim=8)
    assert model.to_dict() == config.model.to_dict()
    assert set(model.overrides) == set(ARCHITECTURE_FIELDS)
    assert set(model.overrides) >= {field.name for field in dataclasses.fields(MixerConfig)}
    assert model.settings.keys() == model.to_dict().keys() - {"family", "variant", *model.overrides}


@pytest.mark.parametrize(
    ("text", "expected"), [("5", (5,)), ("1, 5,10", (1, 5, 10)), ("(2,2,1)", (2, 1))]
)
def test_parse_shots_reads_lists(text: str, expected: tuple[int, ...]) -> None:
    assert parse_shots("shots", text) == expected


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1.5", "-1", "a", "²"])
def test_parse_shots_rejects_other_text(text: str) -> None:
    with raises(UserError, "shots", repr(text)):
        parse_shots("shots", text)


def test_flatten_lists_the_leaves_by_path(config: ConfigDict) -> None:
    values = flatten(config)
    assert values.keys() == FIELDS.keys() | {f"evals.test.{name}" for name in EVAL_FIELDS}
    assert (values["num_steps"], values["evals.test.split"]) == (20_000, "test")


def test_format_help_has_a_line_for_every_key() -> None:
    text = format_help()
    assert max(map(len, text.splitlines())) <= 100
    columns = [line.split()[:2] for line in text.splitlines()]
    for path, field in FIELDS.items():
        default = str(field.default).lower() if field.type is bool else str(field.default)
        assert [path, default or '""'] in columns
    for name in EVAL_FIELDS:
        assert some_line_mentions(text, f"evals.NAME.{name}")
    assert some_line_mentions(text, "image_size", "224", "px")
    assert some_line_mentions(text, "recipe.loss", "[sigmoid|softmax]")
