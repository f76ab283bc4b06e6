"""Tests of configs/: the paper's values, the models' shapes, and that every config trains."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixer_jax.config.config import flatten, parse, resolve_num_steps, validate
from mixer_jax.config.loading import load_config
from mixer_jax.errors import UserError
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import FAMILIES, get_family
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, init_state
from mixer_jax.training.optimizer import make_schedule
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights, save_npz, save_run

FILES = sorted(path.stem for path in Path(__file__).parent.parent.glob("configs/*.py"))
ARGUMENTS = {
    "digits": ["low", "high"],
    "folder": ["photos"],
    "bit_r50x1_jft": ["sgd"],
    **{f"vit_{size}_{data}": ["vit"] for size in ("b16", "l16") for data in ("i1k", "i21k")},
}
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
# What ViT's pre-training configs have in common, and BiT's.
ADAM = {
    "batch_size": 4096,
    "image_size": 224,
    "preprocess.train_crop": "inception",
    "preprocess.min_area": 0.05,
    "preprocess.flip": True,
    "recipe.loss": "sigmoid",
    "recipe.label_smoothing": 0.0,
    "recipe.min_target": 0.0,
    "recipe.mixup": 0.0,
    "recipe.ema_decay": 0.0,
    "preprocess.randaugment_layers": 0,
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.warmup_steps": 10_000,
    "optimizer.decay_type": "linear",
    "optimizer.end_learning_rate": 0.0,
    "model.stochastic_depth": 0.0,
    "model.dropout": 0.0,
}
VIT = ADAM | {"model.family": "vit", "model.pooling": "", "model.pos_embedding": ""}
VIT_JFT = VIT | {
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.0,
    "model.pre_logits": True,
    "model.head_bias": -10.0,
    "dataset.num_classes": 18_291,
    "dataset.num_examples": 303_000_000,
}
VIT_I21K = VIT | {
    "num_epochs": 90.0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.end_learning_rate": 1e-5,
    "optimizer.weight_decay": 0.03,
    "optimizer.clip_norm": 0.0,
    "model.dropout": 0.1,
    "model.pre_logits": True,
    "model.head_bias": -10.0,
    "dataset.num_classes": 21_843,
}
VIT_I1K = VIT | {
    "num_epochs": 300.0,
    "optimizer.learning_rate": 3e-3,
    "optimizer.decay_type": "cosine",
    "optimizer.weight_decay": 0.3,
    "optimizer.clip_norm": 1.0,
    "recipe.min_target": 1e-4,
    "model.dropout": 0.1,
    "model.pre_logits": True,
    "model.head_bias": -10.0,
    "dataset.num_classes": 1_000,
}
AUGREG = VIT | {
    "num_epochs": 300.0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.decay_type": "cosine",
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "preprocess.randaugment_layers": 2,
}
MEDIUM2 = {"preprocess.randaugment_magnitude": 15.0, "recipe.mixup": 0.5}
LIGHT2 = {"preprocess.randaugment_magnitude": 10.0, "recipe.mixup": 0.2}
AUGREG_I1K = (
    AUGREG
    | MEDIUM2
    | {"model.pre_logits": True, "model.head_bias": -6.9, "dataset.num_classes": 1_000}
)
AUGREG_I21K = AUGREG | {
    "model.pre_logits": False,
    "model.head_bias": -10.0,
    "dataset.num_classes": 21_843,
}
BIT = ADAM | {
    "model.family": "bit",
    "model.head_bias": 0.0,
    "optimizer.clip_norm": 0.0,
}
BIT_SGD = BIT | {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.learning_rate": 0.48,
    "optimizer.weight_decay": 1e-3,
    "optimizer.warmup_steps": 5_000,
    "optimizer.decay_type": "staircase",
    "num_epochs": 90.0,
    "optimizer.decay_points": "30/90,60/90,80/90",
}
BIT_L = BIT_SGD | {
    "num_epochs": 40.0,
    "optimizer.decay_points": "10/40,23/40,30/40,37/40",
    "dataset.num_classes": 18_291,
}
# BASELINES, A.4 and B.4.
BASELINES: dict[str, dict[str, Any]] = {
    "vit_b16_i1k": AUGREG_I1K | {"model.variant": "B/16"},
    "vit_l16_i1k": AUGREG_I1K | {"model.variant": "L/16"},
    "vit_b16_i1k:vit": VIT_I1K | {"model.variant": "B/16"},
    "vit_l16_i1k:vit": VIT_I1K | {"model.variant": "L/16"},
    "vit_b16_i21k": AUGREG_I21K | LIGHT2 | {"model.variant": "B/16"},
    "vit_l16_i21k": AUGREG_I21K | MEDIUM2 | {"model.variant": "L/16"},
    "vit_b16_i21k:vit": VIT_I21K | {"model.variant": "B/16"},
    "vit_l16_i21k:vit": VIT_I21K | {"model.variant": "L/16"},
    "vit_b16_jft": VIT_JFT
    | {"model.variant": "B/16", "num_epochs": 7.0, "optimizer.learning_rate": 8e-4},
    "vit_l16_jft": VIT_JFT
    | {"model.variant": "L/16", "num_epochs": 14.0, "optimizer.learning_rate": 4e-4},
    "vit_h14_jft": VIT_JFT
    | {"model.variant": "H/14", "num_epochs": 14.0, "optimizer.learning_rate": 3e-4},
    "bit_r50x1_jft": BIT
    | {
        "model.variant": "R50x1",
        "num_epochs": 7.0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.1,
    },
    "bit_r50x1_jft:sgd": BIT_L | {"model.variant": "R50x1"},
    "bit_r152x4_jft": BIT_L | {"model.variant": "R152x4", "dataset.num_examples": 300_000_000},
    **{
        f"bit_{variant.lower()}_{data}": BIT_SGD
        | {"model.variant": variant, "dataset.num_classes": num_classes}
        for variant in ("R50x1", "R152x4")
        for data, num_classes in (("i1k", 1_000), ("i21k", 21_843))
    },
}
# BASELINES: A.4 and B.4: training steps, of all images.
NUM_STEPS = {
    "vit_b16_jft": 517_822,
    "vit_h14_jft": 1_035_644,
    "bit_r50x1_i1k": 28_150,
    "bit_r152x4_jft": 2_929_687,
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
    expected |= {name.partition(":")[0] for name in BASELINES} | {"finetune_vit", "finetune_bit"}
    families = ("mixer_", "vit_", "bit_", "finetune_")
    assert {stem for stem in FILES if stem.startswith(families)} == expected


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
    assert config.optimizer.name == "adamw"
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert (config.optimizer.warmup_steps, config.optimizer.decay_type) == (10_000, "linear")
    assert (config.optimizer.clip_norm, config.optimizer.end_learning_rate) == (1.0, 0.0)
    assert (config.recipe.loss, config.recipe.label_smoothing) == ("sigmoid", 0.0)


@pytest.mark.parametrize("name", BASELINES)
def test_config_of_vit_or_bit_has_the_papers_values(name: str) -> None:
    config = load_config(name)
    validate(config)
    values = flatten(config)
    assert {key: values[key] for key in BASELINES[name]} == BASELINES[name]
    if name in NUM_STEPS:
        run = parse(config)
        assert resolve_num_steps(run, run.dataset.num_examples) == NUM_STEPS[name]


@pytest.mark.parametrize("name", ["vit_b16_i1k:bit", "bit_r50x1_jft:vit", "finetune_vit:cars"])
def test_config_rejects_unknown_arguments(name: str) -> None:
    with raises(UserError, "argument", repr(name.partition(":")[2])):
        load_config(name)


# BASELINES, A.5: steps, warmup, grid of learning rates.
FINE_TUNING_VIT = {
    "imagenet": (20_000, 500, (0.003, 0.01, 0.03)),
    "cifar10": (10_000, 500, (0.001, 0.003, 0.01, 0.03)),
    "cifar100": (10_000, 500, (0.001, 0.003, 0.01, 0.03)),
    "pets": (500, 100, (0.001, 0.003, 0.01, 0.03)),
    "flowers": (500, 100, (0.001, 0.003, 0.01, 0.03)),
}


@pytest.mark.parametrize("task", FINE_TUNING_VIT)
def test_fine_tuning_config_of_vit_has_the_papers_values(task: str) -> None:
    steps, warmup_steps, grid = FINE_TUNING_VIT[task]
    config = load_config(f"finetune_vit:{task}")
    validate(config)
    check_fine_tuning_data(config, task)
    assert (config.num_steps, config.optimizer.warmup_steps) == (steps, warmup_steps)
    assert (config.batch_size, config.image_size, config.init_head) == (512, 384, "new")
    optimizer, preprocess, recipe = config.optimizer, config.preprocess, config.recipe
    assert (optimizer.name, optimizer.momentum, optimizer.clip_norm) == ("sgd", 0.9, 1.0)
    assert (optimizer.decay_type, optimizer.end_learning_rate) == ("cosine", 0.0)
    assert optimizer.learning_rate in grid
    assert optimizer.weight_decay == 0
    assert (preprocess.train_crop, preprocess.min_area, preprocess.flip) == (
        "inception",
        0.05,
        True,
    )
    assert (preprocess.eval_crop, preprocess.randaugment_layers) == ("resize", 0)
    assert (recipe.loss, recipe.mixup, recipe.ema_decay) == ("softmax", 0.0, 0.0)
    assert (config.model.dropout, config.model.stochastic_depth) == (0.0, 0.0)


# BASELINES, B.5: steps, warmup, steps of decay, mixup, size before the crop, crop.
FINE_TUNING_BIT = {
    "imagenet": (20_000, 500, (6_000, 12_000, 18_000), 0.1, 448, 384),
    "imagenet,480": (20_000, 500, (6_000, 12_000, 18_000), 0.1, 512, 480),
    "cifar10": (10_000, 500, (3_000, 6_000, 9_000), 0.1, 160, 128),
    "cifar100,480": (10_000, 500, (3_000, 6_000, 9_000), 0.1, 160, 128),
    "pets": (500, 100, (200, 300, 400), 0.0, 448, 384),
    "flowers,480": (500, 100, (200, 300, 400), 0.0, 512, 480),
}


@pytest.mark.parametrize("argument", FINE_TUNING_BIT)
def test_fine_tuning_config_of_bit_follows_hyperrule(argument: str) -> None:
    steps, warmup_steps, decay_steps, mixup, resize_size, image_size = FINE_TUNING_BIT[argument]
    config = load_config(f"finetune_bit:{argument}")
    check_fine_tuning_data(config, argument.partition(",")[0])
    optimizer, preprocess, recipe = config.optimizer, config.preprocess, config.recipe
    assert (config.num_steps, optimizer.warmup_steps) == (steps, warmup_steps)
    assert (config.batch_size, config.image_size, config.init_head) == (512, image_size, "new")
    assert (preprocess.train_crop, preprocess.resize_size) == ("bilinear_crop", resize_size)
    assert (preprocess.eval_crop, preprocess.flip) == ("resize", True)
    assert (recipe.loss, recipe.mixup, recipe.label_smoothing) == ("softmax", mixup, 0.0)
    assert (optimizer.name, optimizer.momentum, optimizer.learning_rate) == ("sgd", 0.9, 0.003)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, 0.0)
    schedule = make_schedule(parse(config).optimizer, steps)
    for index, step in enumerate(decay_steps):
        assert float(schedule(jnp.int32(step - 1))) == pytest.approx(0.003 * 0.1**index)
        assert float(schedule(jnp.int32(step))) == pytest.approx(0.003 * 0.1 ** (index + 1))
    with raises(UserError, "argument", "pets,512"):
        load_config("finetune_bit:pets,512")


def check_fine_tuning_data(config: ConfigDict, task: str) -> None:
    """Checks that a config has the same data as Mixer's for this task."""
    mixers = load_fine_tuning(task)
    for key in ("name", "train_split", "num_classes", "num_examples"):
        assert config.dataset[key] == mixers.dataset[key]
    splits = [[entry.split for entry in c.evals.values()] for c in (config, mixers)]
    assert splits[0] == splits[1]


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
    expected = get_family(config.model.family).num_params(
        config.model.architecture, config.image_size, experiment.model.num_classes
    )
    params, moments = experiment.state_shape.params, experiment.state_shape.opt_state
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    # Adam has two moments per parameter, SGD one; and there are one or two counters.
    size = (2 if config.optimizer.name == "adamw" else 1) * expected
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) in (size + 1, size + 2)


def shrink(config: ConfigDict) -> None:
    """Makes a config small enough for two quick steps, and keeps its recipe."""
    config.dataset.name = "synthetic"
    config.dataset.num_classes = min(config.dataset.num_classes or 10, 50)
    config.dataset.num_examples = 64
    config.num_steps, config.batch_size = 20_000, 16
    config.image_size = 16
    config.model.variant = "custom"
    if config.model.family == "bit":
        config.model.units, config.model.root_width, config.model.root = "1,1", 8, "3x3"
        return
    config.model.num_blocks, config.model.patch_size, config.model.hidden_dim = 2, 8, 16
    config.model.scan_unroll = 1
    if config.model.family == "vit":
        config.model.mlp_dim, config.model.num_heads = 32, 2
    else:
        config.model.tokens_mlp_dim, config.model.channels_mlp_dim = 8, 32


# Numbers that change the program only if they are zero, and keys that do not change it.
SWITCHES = {
    "model.dropout",
    "model.head_bias",
    "model.stochastic_depth",
    "optimizer.clip_norm",
    "optimizer.end_learning_rate",
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
    "optimizer.decay_points",
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


def test_half_of_the_configs_share_a_program() -> None:
    assert len(configs_with_distinct_programs()) <= len(CONFIGS) / 2


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
        state, metrics = experiment.train_step(state, next(batches), experiment.hyperparams)
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
    assert (optimizer.name, optimizer.momentum, optimizer.clip_norm) == ("sgd", 0.9, 1.0)
    assert (optimizer.decay_type, optimizer.end_learning_rate) == ("cosine", 0.0)
    grid = (0.003, 0.01, 0.03, 0.06) if task == "imagenet" else (0.001, 0.003, 0.01, 0.03)
    assert optimizer.learning_rate in grid
    assert optimizer.weight_decay == 0
    assert config.recipe.to_dict() == {
        "loss": "softmax",
        "label_smoothing": 0.0,
        "min_target": 0.0,
        "class_weights": "none",
        "mixup": 0.0,
        "cutmix": 0.0,
        "mixup_switch_prob": 0.5,
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
@pytest.mark.parametrize(
    ("name", "architecture", "image_size"),
    [
        ("finetune_vit:pets", VitConfig(1, 32, 16, 24, 2, pre_logits=True), 384),
        ("finetune_bit:cifar10", BitConfig("1,1", 8), 128),
    ],
)
def test_fine_tuning_config_of_another_family_starts_from_pretrained_weights(
    name: str, architecture: Any, image_size: int, tmp_path: Path
) -> None:
    weights = random_weights(architecture, (224, 224), class_names=(), num_classes=21)
    unparsed = load_config(name)
    unparsed.init_from = save_run(weights, tmp_path / "pretrained")
    unparsed.dataset.name = "synthetic"
    unparsed.dataset.num_examples, unparsed.batch_size = 64, 8
    config = parse(unparsed)
    datasets = open_datasets(config)
    source = find_init_source(config, str(tmp_path / "run"))
    assert source is not None
    experiment = build_experiment(config, datasets, init_info=source.model_info)
    info = experiment.model_info
    assert (info.image_size, info.eval_crop) == ((image_size, image_size), "resize")
    state = init_state(experiment, source.weights)
    assert set(state.params) == {name.partition("/")[0] for name in info.param_shapes()}
    assert "pre_logits" not in state.params
    assert not state.params["head"]["kernel"].any()
    for batch in itertools.islice(make_train_batches(experiment, 0, print), 2):
        state, metrics = experiment.train_step(state, batch, experiment.hyperparams)
        assert np.isfinite(metrics["loss"])
    assert state.params["head"]["kernel"].any()


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
        state, metrics = experiment.train_step(state, batch, experiment.hyperparams)
        assert np.isfinite(metrics["loss"])
    # The learning rate is 0 in the first step; in the second the head is zero, and moves.
    assert state.params["head"]["kernel"].any()
    np.testing.assert_array_equal(stem, state.params["stem"]["kernel"])
