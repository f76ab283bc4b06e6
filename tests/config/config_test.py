"""Tests of the configuration: its rules, its files, and what may change when a run is resumed."""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixer_jax.config import config as config_lib
from mixer_jax.config.loading import load_config, set_override
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS
from mixer_jax.data.preprocess import train_image
from mixer_jax.errors import UserError
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.mixer_config import MixerConfig, get_config, num_params
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.messages import mentions, raises

# Those that begin with weights are in finetune_configs_test.py.
FILES = [
    path
    for path in sorted(Path(__file__).parent.parent.parent.glob("configs/*.py"))
    if not path.stem.startswith("finetune_")
]
ARGUMENTS = {"digits": ["low", "high"], "folder": ["photos"]}
CONFIGS = [str(path) for path in FILES] + [
    f"{path}:{argument}" for path in FILES for argument in ARGUMENTS.get(path.stem, [])
]
PAPER_FILES = {path.stem for path in FILES if path.stem.startswith("mixer_")}


@pytest.fixture
def config() -> ConfigDict:
    config = config_lib.get_default()
    config.num_steps = 20_000
    config.evals = config_lib.evals(test={"split": "test"})
    return config


def test_every_key_has_a_meaning_and_a_default_that_is_valid(config: ConfigDict) -> None:
    config_lib.validate(config)
    assert all(key.meaning for key in FIELDS.values())
    help_text = config_lib.format_help()
    for path in config_lib.flatten(config_lib.get_default()):
        assert mentions(help_text, f"{path}=")


def read_names() -> set[str]:
    """Returns every attribute, parameter and keyword argument in the package's code."""
    names: set[str] = set()
    for path in Path("mixer_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.arg | ast.keyword):
                names.add(str(node.arg))
    # A model's settings are the fields of its class.
    return names | set(MlpMixer.__dataclass_fields__) | {"family", "backend"}


def test_every_key_is_read_somewhere() -> None:
    used = read_names()
    unread = [path for path in FIELDS if path.split(".")[-1] not in used]
    assert unread == []


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("seed", -1, ["seed", "0", "4294967295"]),
        ("seed", 1.5, ["seed"]),
        ("batch_size", True, ["batch_size"]),
        ("model.variant", "B/17", ["model.variant", "S/32", "B/16", "H/14"]),
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
        ("preprocess.max_shift", 224, ["preprocess.max_shift"]),
        ("optimizer.name", "sgd", ["optimizer.name", "adam", "momentum"]),
        ("evals.test.every_steps", -5, ["evals.test.every_steps"]),
    ],
)
def test_rules(config: ConfigDict, key: str, value: Any, parts: list[str]) -> None:
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.unlocked(), node.ignore_type():
        node[name] = value
    with raises(UserError, str(value), *parts):
        config_lib.validate(config)


def test_keys_that_nobody_declared_are_errors(config: ConfigDict) -> None:
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with raises(UserError, "optimizer.learning_rat", "optimizer.learning_rate"):
        config_lib.validate(config)
    with raises(UserError, "evals.test.splt", "evals.test.split"):
        config_lib.evals(test={"splt": "test"})


@pytest.mark.parametrize(
    ("path", "hints"),
    [
        ("learning_rate", ["optimizer.learning_rate"]),
        ("optimizr.learning_rate", ["optimizer.learning_rate"]),
        ("optimizer.warmup_step", ["optimizer.warmup_steps"]),
        ("optimizer.lr", ["name", "learning_rate", "warmup_steps"]),
        ("zzz", ["--help"]),
        ("evals.val.split", ["evals.test.split"]),
    ],
)
def test_unknown_keys_get_a_hint(config: ConfigDict, path: str, hints: list[str]) -> None:
    with raises(UserError, path, *hints):
        set_override(config, path, "1")


def test_overrides_take_the_type_of_the_key(config: ConfigDict) -> None:
    for path, text in [
        ("optimizer.learning_rate", "3e-3"),
        ("batch_size", "512"),
        ("preprocess.flip", "False"),
        ("dataset.name", "cifar10"),
        ("evals.test.every_steps", "10"),
    ]:
        set_override(config, path, text)
    values = config_lib.flatten(config)
    assert values["optimizer.learning_rate"] == 3e-3
    assert values["batch_size"] == 512
    assert values["preprocess.flip"] is False
    assert values["dataset.name"] == "cifar10"
    assert values["evals.test.every_steps"] == 10
    for path, text in [("batch_size", "1.5"), ("preprocess.flip", "maybe"), ("image_size", "")]:
        with raises(UserError, path, repr(text)):
            set_override(config, path, text)


def test_epochs_make_whole_steps(config: ConfigDict) -> None:
    config.num_steps, config.num_epochs, config.batch_size = 0, 300.0, 4096
    assert config_lib.resolve_num_steps(config, 1_268_355) == 92_897
    config.num_steps = 7
    assert config_lib.resolve_num_steps(config, 1_268_355) == 7


def test_the_papers_table_is_complete() -> None:
    expected = {f"mixer_{m}_{d}" for m in ("b16", "l16") for d in ("i1k", "i21k")}
    expected |= {f"mixer_{m}_jft" for m in ("s32", "s16", "b32", "b16", "l32", "l16", "h14")}
    assert expected == PAPER_FILES


# PAPER: section 2: learning rate, weight decay, RandAugment, mixup, stochastic depth, epochs.
I1K = (1e-3, 0.1, 2, 15.0, 0.5, 0.1, 300.0)
TABLE = {
    "mixer_b16_i1k": I1K,
    "mixer_l16_i1k": I1K,
    "mixer_b16_i21k": (1e-3, 0.1, 2, 10.0, 0.2, 0.1, 300.0),
    "mixer_l16_i21k": (1e-3, 0.1, 2, 20.0, 0.5, 0.1, 300.0),
    "mixer_s32_jft": (3e-3, 0.03, 0, 10.0, 0.0, 0.0, 5.0),
    "mixer_s16_jft": (3e-3, 0.03, 0, 10.0, 0.0, 0.0, 5.0),
    "mixer_b32_jft": (3e-3, 0.03, 0, 10.0, 0.0, 0.0, 7.0),
    "mixer_b16_jft": (3e-3, 0.03, 0, 10.0, 0.0, 0.0, 7.0),
    "mixer_l32_jft": (1e-3, 0.03, 0, 10.0, 0.0, 0.0, 7.0),
    "mixer_l16_jft": (1e-3, 0.03, 0, 10.0, 0.0, 0.0, 14.0),
    "mixer_h14_jft": (1e-3, 0.03, 0, 10.0, 0.0, 0.0, 14.0),
}


@pytest.mark.parametrize("name", TABLE)
def test_configs_are_the_papers_rows(name: str) -> None:
    config = load_config(f"configs/{name}.py")
    values = config_lib.flatten(config)
    keys = (
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "preprocess.randaugment_layers",
        "preprocess.randaugment_magnitude",
        "recipe.mixup",
        "model.stochastic_depth",
        "num_epochs",
    )
    assert tuple(values[key] for key in keys) == TABLE[name]
    letter, patch = name.split("_")[1][0].upper(), name.split("_")[1][1:]
    assert config.model.variant == f"{letter}/{patch}"
    assert (config.batch_size, config.image_size, config.num_steps) == (4096, 224, 0)
    assert config.optimizer.name == "adam"
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert (config.optimizer.warmup_steps, config.optimizer.decay_type) == (10_000, "linear")
    assert (config.optimizer.clip_norm, config.optimizer.end_learning_rate) == (1.0, 0.0)
    assert (config.recipe.loss, config.recipe.label_smoothing) == ("sigmoid", 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_has_the_models_shapes(name: str) -> None:
    config = load_config(name)
    config_lib.validate(config)
    config.dataset.name = "synthetic"
    config.dataset.num_examples = max(config.dataset.num_examples, 10_000)
    experiment = build_experiment(config, open_datasets(config))
    widths = get_config(config.model.variant, **config_lib.architecture_overrides(config.model))
    expected = num_params(widths, config.image_size, experiment.model.num_classes)
    params, moments = experiment.state_shape.params, experiment.state_shape.opt_state
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    # Adam holds two moments of every parameter, momentum one; and there are one or two counters.
    held = (2 if config.optimizer.name == "adam" else 1) * expected
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) in (held + 1, held + 2)


def shrink(config: ConfigDict) -> None:
    """Makes a config small enough for two quick steps, and leaves its recipe alone."""
    config.dataset.name = "synthetic"
    config.dataset.num_classes = min(config.dataset.num_classes or 10, 50)
    config.dataset.num_examples = 64
    config.num_steps, config.batch_size = 20_000, 16
    config.model.variant = "custom"
    config.model.num_blocks, config.model.patch_size, config.model.hidden_dim = 2, 8, 16
    config.model.tokens_mlp_dim, config.model.channels_mlp_dim = 8, 32
    config.image_size = 16
    config.model.scan_unroll = 1


# Numbers that make no other program, unless they are zero, and what only reading data asks for.
SWITCHES = {
    "model.head_bias",
    "model.stochastic_depth",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "preprocess.randaugment_magnitude",
    "recipe.mixup",
}
UNCOMPILED = ("checkpoint.", "dataset.", "evals.", "loader.", "bad_images.", "num_epochs", "log_")


def of_each_program() -> list[str]:
    """Returns a config for each program that the shrunken ones make: the first of those alike."""
    found: dict[Any, str] = {}
    for name in CONFIGS:
        config = load_config(name)
        shrink(config)
        values = config_lib.flatten(config).items()
        program = tuple(
            (path, bool(value) if path in SWITCHES else value)
            for path, value in values
            if not path.startswith(UNCOMPILED)
        )
        found.setdefault(program, name)
    return list(found.values())


def test_alike_configs_are_found() -> None:
    assert len(of_each_program()) < len(CONFIGS) / 2


@pytest.mark.parametrize("name", of_each_program())
def test_configs_run_two_steps_on_eight_devices(name: str) -> None:
    config = load_config(name)
    shrink(config)
    config_lib.validate(config)
    experiment = build_experiment(config, open_datasets(config))
    assert experiment.mesh.size == 8
    state, losses = experiment.create_state(), []
    batches = make_train_batches(experiment, 0, print)
    for _ in range(2):
        state, metrics = experiment.train_step(state, next(batches))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert int(state.step) == 2
    first = experiment.create_state()
    # The first step has learning rate 0 and a zero head lets no gradient through: the second step
    # moves the head.
    assert (first.params["head"]["kernel"] != state.params["head"]["kernel"]).any()


def test_choices_are_what_the_code_knows() -> None:
    accepted = train_image.__annotations__
    assert {key.split(".")[1] for key in FIELDS if key.startswith("preprocess.")} == (
        accepted.keys() - {"encoded", "rng", "image_size", "out", "return"}
    ) | {"eval_crop"}
    model_keys = {key.split(".")[1] for key in FIELDS if key.startswith("model.")}
    fields = {
        field.name
        for dataclass in (MixerConfig, Execution, MlpMixer)
        for field in dataclasses.fields(dataclass)
    }
    assert model_keys - {"family", "variant"} <= fields


def test_evaluations_are_entries_of_their_own() -> None:
    made: Callable[..., ConfigDict] = config_lib.evals
    config = made(val={"split": "validation", "every_steps": 10}, real={"dataset": "cifar10"})
    defaults = {name: key.default for name, key in EVAL_FIELDS.items()}
    assert config.val.to_dict() == defaults | {"split": "validation", "every_steps": 10}
    assert config.real.to_dict() == defaults | {"dataset": "cifar10"}
    assert (defaults["type"], defaults["split"], defaults["every_steps"]) == ("classify", "test", 0)
