"""Tests of configs/: the paper's values, the models' shapes, and that every config trains."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixer_jax.config.config import flatten, parse, validate
from mixer_jax.config.loading import load_config
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import FAMILIES, get_family
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, init_state
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights, save_npz

FILES = sorted(path.stem for path in Path(__file__).parent.parent.glob("configs/*.py"))
ARGUMENTS = {"digits": ["low", "high"], "folder": ["photos"]}
# Configs that train from random initialization.
CONFIGS = [
    f"configs/{stem}.py{argument}"
    for stem in FILES
    if not stem.startswith("finetune_")
    for argument in ["", *(f":{argument}" for argument in ARGUMENTS.get(stem, []))]
]

# PAPER: section 2: learning rate, weight decay, RandAugment, mixup, stochastic depth, epochs.
IMAGENET1K = (1e-3, 0.1, 2, 15.0, 0.5, 0.1, 300.0)
PRETRAINING = {
    "mixer_b16_i1k": IMAGENET1K,
    "mixer_l16_i1k": IMAGENET1K,
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
# PAPER, Section 3: steps, warmup, dataset, training split, classes, evaluation split.
FINE_TUNING: dict[str, tuple[Any, ...]] = {
    "imagenet": (20_000, 500, "imagenet2012", "train", 1_000, "validation"),
    "cifar10": (10_000, 500, "cifar10", "train", 10, "test"),
    "cifar100": (10_000, 500, "cifar100", "train", 100, "test"),
    "pets": (500, 100, "oxford_iiit_pet", "train", 37, "test"),
    "flowers": (500, 100, "oxford_flowers102", "train+validation", 102, "test"),
    "folder": (500, 100, "folder:images", "train", 0, "validation"),
}

# Image size of the dataset, classes, and number of parameters that the docstring states.
FROM_SCRATCH = {
    "fashion_mnist": (28, 10, 175_214),
    "cifar10": (32, 10, 1_132_170),
    "cifar100": (32, 100, 1_143_780),
}


def test_configs_cover_the_papers_tables() -> None:
    expected = {*PRETRAINING, *(f"finetune_{task}" for task in FINE_TUNING)}
    assert {stem for stem in FILES if stem.startswith(("mixer_", "finetune_"))} == expected


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_config_has_the_papers_values(name: str) -> None:
    config = load_config(f"configs/{name}.py")
    values = flatten(config)
    keys = (
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "preprocess.randaugment_layers",
        "preprocess.randaugment_magnitude",
        "recipe.mixup",
        "model.stochastic_depth",
        "num_epochs",
    )
    assert tuple(values[key] for key in keys) == PRETRAINING[name]
    letter, patch_size = name.split("_")[1][0].upper(), name.split("_")[1][1:]
    assert (config.model.family, config.model.variant) == ("mixer", f"{letter}/{patch_size}")
    assert (config.batch_size, config.image_size, config.num_steps) == (4096, 224, 0)
    assert config.optimizer.name == "adam"
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert (config.optimizer.warmup_steps, config.optimizer.decay_type) == (10_000, "linear")
    assert (config.optimizer.clip_norm, config.optimizer.end_learning_rate) == (1.0, 0.0)
    assert (config.recipe.loss, config.recipe.label_smoothing) == ("sigmoid", 0.0)


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_small_config_sees_whole_images_and_has_the_stated_parameters(name: str) -> None:
    image_size, num_classes, num_params = FROM_SCRATCH[name]
    config = load_config(f"configs/{name}.py")
    validate(config)
    dataset, preprocess = config.dataset, config.preprocess
    assert (dataset.name, dataset.num_classes, config.image_size) == (name, num_classes, image_size)
    assert (preprocess.eval_crop, config.init_from) == ("resize", "")
    assert preprocess.train_crop in ("resize", "random_shift")
    architecture = parse(config).model.architecture
    assert get_family("mixer").num_params(architecture, image_size, num_classes) == num_params
    assert [entry.split for entry in config.evals.values()] == ["test"]


@pytest.mark.parametrize("name", ["compare_digits", "study_fashion_mnist"])
def test_compared_models_have_equal_training_flops_and_one_recipe(name: str) -> None:
    found, shared = {}, set()
    for name_of_family, family in FAMILIES.items():
        unparsed = load_config(f"configs/{name}.py:{name_of_family}")
        unparsed.dataset.num_examples = 1_000
        config = parse(unparsed)
        assert config.model.family == name_of_family
        forward = family.forward_flops(config.model.architecture, config.image_size, 10)
        found[name_of_family] = 3 * forward * config.batch_size * config.num_steps
        same = ("preprocess", "recipe", "evals", "batch_size", "image_size")
        shared.add(repr([getattr(config, section) for section in same]))
    assert max(found.values()) < 1.002 * min(found.values())
    assert len(shared) == 1
    with raises(UserError, "resnet", *FAMILIES):
        load_config(f"configs/{name}.py:resnet")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_has_the_models_shapes(name: str) -> None:
    unparsed = load_config(name)
    validate(unparsed)
    unparsed.dataset.name = "synthetic"
    unparsed.dataset.num_examples = max(unparsed.dataset.num_examples, 10_000)
    config = parse(unparsed)
    experiment = build_experiment(config, open_datasets(config))
    expected = get_family("mixer").num_params(
        config.model.architecture, config.image_size, experiment.model.num_classes
    )
    params, moments = experiment.state_shape.params, experiment.state_shape.opt_state
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    # Adam has two moments per parameter, SGD one; and there are one or two counters.
    size = (2 if config.optimizer.name == "adam" else 1) * expected
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) in (size + 1, size + 2)


def shrink(config: ConfigDict) -> None:
    """Makes a config small enough for two quick steps, and keeps its recipe."""
    config.dataset.name = "synthetic"
    config.dataset.num_classes = min(config.dataset.num_classes or 10, 50)
    config.dataset.num_examples = 64
    config.num_steps, config.batch_size = 20_000, 16
    config.model.variant = "custom"
    config.model.num_blocks, config.model.patch_size, config.model.hidden_dim = 2, 8, 16
    config.model.tokens_mlp_dim, config.model.channels_mlp_dim = 8, 32
    config.image_size = 16
    config.model.scan_unroll = 1


# Numbers that change the program only if they are zero, and keys that do not change it.
SWITCHES = {
    "model.head_bias",
    "model.stochastic_depth",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "preprocess.randaugment_magnitude",
    "recipe.mixup",
}
NOT_COMPILED = (
    "checkpoint.",
    "dataset.",
    "evals.",
    "eval_batch_size",
    "loader.",
    "bad_images.",
    "num_epochs",
    "log_",
)


def configs_with_distinct_programs() -> list[str]:
    """Returns the first config of each program that the shrunken configs compile to."""
    found: dict[Any, str] = {}
    for name in CONFIGS:
        config = load_config(name)
        shrink(config)
        program = tuple(
            (path, bool(value) if path in SWITCHES else value)
            for path, value in flatten(config).items()
            if not path.startswith(NOT_COMPILED)
        )
        found.setdefault(program, name)
    return list(found.values())


def test_most_configs_share_a_program() -> None:
    assert len(configs_with_distinct_programs()) < len(CONFIGS) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", configs_with_distinct_programs())
def test_config_trains_two_steps_on_eight_devices(name: str) -> None:
    unparsed = load_config(name)
    shrink(unparsed)
    config = parse(unparsed)
    experiment = build_experiment(config, open_datasets(config))
    assert experiment.mesh.size == 8
    state, losses = experiment.create_state(), []
    batches = make_train_batches(experiment, 0, print)
    for _ in range(2):
        state, metrics = experiment.train_step(state, next(batches))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert int(state.step) == 2
    initial = experiment.create_state()
    # The learning rate is 0 in the first step; the second moves the head, which was zero.
    assert (initial.params["head"]["kernel"] != state.params["head"]["kernel"]).any()


def load_fine_tuning(task: str, size: str = "") -> ConfigDict:
    config = load_config(f"configs/finetune_{task}.py" + (f":{size}" if size else ""))
    validate(config)
    return config


@pytest.mark.parametrize("task", FINE_TUNING)
def test_fine_tuning_config_has_the_papers_values(task: str) -> None:
    steps, warmup_steps, dataset, split, num_classes, eval_split = FINE_TUNING[task]
    config = load_fine_tuning(task)
    assert (config.num_steps, config.optimizer.warmup_steps) == (steps, warmup_steps)
    assert (config.dataset.name, config.dataset.train_split) == (dataset, split)
    assert config.dataset.num_classes == num_classes
    assert [entry.split for entry in config.evals.values()] == [eval_split]
    assert (config.batch_size, config.init_head) == (512, "new")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.clip_norm) == ("momentum", 0.9, 1.0)
    assert (optimizer.decay_type, optimizer.end_learning_rate) == ("cosine", 0.0)
    grid = (0.003, 0.01, 0.03, 0.06) if task == "imagenet" else (0.001, 0.003, 0.01, 0.03)
    assert optimizer.learning_rate in grid
    assert optimizer.weight_decay == 0
    assert config.recipe.to_dict() == {
        "loss": "softmax",
        "label_smoothing": 0.0,
        "min_target": 0.0,
        "mixup": 0.0,
        "grad_accum_steps": 1,
        "ema_decay": 0.0,
    }
    assert (config.preprocess.train_crop, config.preprocess.flip) == ("random_crop", True)
    assert config.preprocess.randaugment_layers == 0
    assert (config.model.stochastic_depth, config.model.dropout) == (0.0, 0.0)


@pytest.mark.parametrize("task", FINE_TUNING)
def test_fine_tuning_config_has_the_evaluation_crop_of_the_papers_table(task: str) -> None:
    crops = {load_fine_tuning(task, size).preprocess.eval_crop for size in ("", "224")}
    assert crops == {"shorter_side"}
    large = load_fine_tuning(task, "448")
    assert (large.image_size, large.preprocess.eval_crop) == (448, "square")
    with raises(UserError, "300", "224", "448"):
        load_fine_tuning(task, "300")


@pytest.fixture(scope="module")
def pretrained_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model at 224 px in Google's format."""
    architecture = MixerConfig(
        num_blocks=1, patch_size=32, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=16
    )
    weights = random_weights(architecture, (224, 224), class_names=(), num_classes=21)
    return save_npz(weights, tmp_path_factory.mktemp("pretrained") / "Mixer-T_32.npz")


@pytest.mark.slow
@pytest.mark.parametrize("task", FINE_TUNING)
def test_fine_tuning_config_starts_from_a_pretrained_file(
    task: str, pretrained_file: str, tmp_path: Path
) -> None:
    # The tasks differ in numbers only: half of them use each size, and one per size trains.
    index = list(FINE_TUNING).index(task)
    size = ("224", "448")[index % 2]
    unparsed = load_fine_tuning(task, size)
    unparsed.init_from = pretrained_file
    unparsed.dataset.name = "synthetic"
    unparsed.dataset.num_examples, unparsed.batch_size = 64, 8
    config = parse(unparsed)
    datasets = open_datasets(config)
    source = find_init_source(config, str(tmp_path))
    assert source is not None
    experiment = build_experiment(config, datasets, init_info=source.model_info)
    tiled = MixerConfig(1, 32, 16, 8 * (int(size) // 224) ** 2, 16)
    params = experiment.state_shape.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    num_classes = FINE_TUNING[task][4] or 1000
    assert count == get_family("mixer").num_params(tiled, int(size), num_classes)
    state = init_state(experiment, source.weights)
    assert not state.params["head"]["kernel"].any()
    if index >= 2:
        return
    stem = np.array(state.params["stem"]["kernel"])
    for batch in itertools.islice(make_train_batches(experiment, 0, print), 2):
        state, metrics = experiment.train_step(state, batch)
        assert np.isfinite(metrics["loss"])
    # The learning rate is 0 in the first step; in the second the head is zero, and moves.
    assert state.params["head"]["kernel"].any()
    np.testing.assert_array_equal(stem, state.params["stem"]["kernel"])
