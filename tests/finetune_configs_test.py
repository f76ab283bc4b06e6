"""Tests of the fine-tuning configs: the paper's protocol, and that they run from real files."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixer_jax.checkpoints.formats.npz import write_npz
from mixer_jax.checkpoints.layouts import GOOGLE, layout_views
from mixer_jax.checkpoints.tree import flatten
from mixer_jax.config.config import validate
from mixer_jax.config.loading import load_config
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig, num_params
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, init_state
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights

# PAPER, Section 3: steps, warmup, data set, training split, classes, split scored.
PROTOCOL: dict[str, tuple[Any, ...]] = {
    "imagenet": (20_000, 500, "imagenet2012", "train", 1_000, "validation"),
    "cifar10": (10_000, 500, "cifar10", "train", 10, "test"),
    "cifar100": (10_000, 500, "cifar100", "train", 100, "test"),
    "pets": (500, 100, "oxford_iiit_pet", "train", 37, "test"),
    "flowers": (500, 100, "oxford_flowers102", "train+validation", 102, "test"),
    "folder": (500, 100, "folder:images", "train", 0, "validation"),
}
WIDTHS = MixerConfig(
    num_blocks=1, patch_size=32, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=16
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as Google publishes them, of a small model at 224 px."""
    weights = random_weights(WIDTHS, (224, 224), class_names=(), num_classes=21)
    path = str(tmp_path_factory.mktemp("published") / "Mixer-T_32.npz")
    write_npz(path, layout_views(dict(flatten(weights.params)), GOOGLE), {})
    return path


def load(task: str, size: str = "") -> ConfigDict:
    config = load_config(f"configs/finetune_{task}.py" + (f":{size}" if size else ""))
    validate(config)
    return config


def test_all_of_them_are_here(root: Path) -> None:
    found = {path.stem.removeprefix("finetune_") for path in root.glob("configs/finetune_*.py")}
    assert found == PROTOCOL.keys()


@pytest.mark.parametrize("task", PROTOCOL)
def test_they_are_the_papers_protocol(task: str) -> None:
    steps, warmup, dataset, split, classes, scored = PROTOCOL[task]
    config = load(task)
    assert (config.num_steps, config.optimizer.warmup_steps) == (steps, warmup)
    assert (config.dataset.name, config.dataset.train_split) == (dataset, split)
    assert config.dataset.num_classes == classes
    assert [entry.split for entry in config.evals.values()] == [scored]
    assert (config.batch_size, config.init_head) == (512, "new")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.clip_norm) == ("momentum", 0.9, 1.0)
    assert (optimizer.decay_type, optimizer.end_learning_rate) == ("cosine", 0.0)
    assert optimizer.learning_rate in (0.003, 0.01, 0.03, 0.06)
    assert optimizer.weight_decay == 0
    assert config.recipe.to_dict() == {
        "loss": "softmax",
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "grad_accum_steps": 1,
        "ema_decay": 0.0,
    }
    assert (config.preprocess.train_crop, config.preprocess.flip) == ("random_crop", True)
    assert config.preprocess.randaugment_layers == 0
    assert (config.model.stochastic_depth, config.model.dropout) == (0.0, 0.0)


@pytest.mark.parametrize("task", PROTOCOL)
def test_the_evaluation_crop_is_that_of_the_papers_table(task: str) -> None:
    crops = {load(task, size).preprocess.eval_crop for size in ("", "224")}
    assert crops == {"shorter_side"}
    large = load(task, "448")
    assert (large.image_size, large.preprocess.eval_crop) == (448, "square")
    with raises(UserError, "300", "224", "448"):
        load(task, "300")


@pytest.mark.parametrize("task", PROTOCOL)
def test_runs_begin_with_a_published_file(task: str, published: str, tmp_path: Path) -> None:
    # They differ in numbers only: each size is made for half of the tasks, and runs for one.
    number = list(PROTOCOL).index(task)
    size = ("224", "448")[number % 2]
    config = load(task, size)
    config.init_from = published
    config.dataset.name = "synthetic"
    config.dataset.num_examples, config.batch_size = 64, 8
    sources = open_datasets(config)
    beginning = find_init_source(config, str(tmp_path))
    assert beginning is not None
    experiment = build_experiment(config, sources, init_info=beginning.about)
    classes = PROTOCOL[task][4] or 1000
    grown = MixerConfig(1, 32, 16, 8 * (int(size) // 224) ** 2, 16)
    params = experiment.state_shape.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == num_params(grown, int(size), classes)
    state = init_state(experiment, beginning.weights)
    assert not state.params["head"]["kernel"].any()
    if number >= 2:
        return
    stem = np.array(state.params["stem"]["kernel"])
    for batch in itertools.islice(make_train_batches(experiment, 0, print), 2):
        state, metrics = experiment.train_step(state, batch)
        assert np.isfinite(metrics["loss"])
    # The first step has learning rate 0, the second a head of zeros, which it moves.
    assert state.params["head"]["kernel"].any()
    np.testing.assert_array_equal(stem, state.params["stem"]["kernel"])


def test_the_model_cannot_be_taken_from_nothing() -> None:
    config = load("pets")
    config.init_from = ""
    with raises(UserError, "model.variant", "init_from"):
        validate(config)
    config = load("pets")
    config.model.hidden_dim = 8
    with raises(UserError, "hidden_dim", "8", "model.variant", "init_from"):
        validate(config)
