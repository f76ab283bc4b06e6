"""Tests of what a run begins with: other weights, at another image size, with or without head."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixer_jax.checkpoints.formats.npz import write_npz
from mixer_jax.checkpoints.layouts import layout_views
from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.tree import flatten
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.mixer_layouts import GOOGLE
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import describe_init, find_init_source, restore_or_init
from mixer_jax.training.setup import Experiment, build_experiment, make_train_batches
from mixer_jax.training.step import TrainState
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import TINY, assert_params_equal, random_weights, save_run
from tests.helpers.tiny_run import small_config

# The widths that small_run sets, and a grown form of them.
LOW = tuple(str(digit) for digit in range(5))
AUTO: dict[str, Any] = {
    "model__variant": "init_from",
    "model__num_blocks": 0,
    "model__patch_size": 0,
    "model__hidden_dim": 0,
    "model__tokens_mlp_dim": 0,
    "model__channels_mlp_dim": 0,
}


def start(config: ConfigDict, workdir: Path) -> tuple[Experiment, TrainState, str]:
    """What a run does before its first step."""
    beginning = find_init_source(config, str(workdir))
    sources = open_datasets(config)
    experiment = build_experiment(config, sources, init_info=beginning and beginning.about)
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    state, window = restore_or_init(experiment, checkpoints, 0, beginning)
    assert window == []
    return experiment, state, describe_init(experiment, beginning)


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights()


@pytest.fixture(scope="module")
def run(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_run(weights, tmp_path_factory.mktemp("run"))


def test_the_head_is_kept_where_the_classes_are_the_same(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(digits_dir, init_from=run, **AUTO)
    _, state, said = start(config, tmp_path)
    assert_params_equal(state.params, weights.params)
    assert mentions(said, run)
    # One line.
    assert said.index("\n") == len(said) - 1


def test_a_new_head_is_zero_and_has_the_bias_of_the_config(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(digits_dir, init_from=run, init_head="new", model__head_bias=-1.0, **AUTO)
    experiment, state, said = start(config, tmp_path)
    _, _, said_of_kept = start(small_config(digits_dir, init_from=run, **AUTO), tmp_path / "kept")
    head = state.params.pop("head")
    assert_params_equal(state.params, {k: v for k, v in weights.params.items() if k != "head"})
    assert head["kernel"].shape == (16, 10)
    assert not head["kernel"].any()
    np.testing.assert_array_equal(head["bias"], np.full(10, -1.0))
    assert mentions(said, run)
    assert said != said_of_kept
    state.params["head"] = head
    batch = next(make_train_batches(experiment, 0, print))
    _, metrics = experiment.train_step(state, batch)
    assert np.isfinite(metrics["loss"])


def test_other_classes_get_a_new_head(run: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir, "configs/digits.py:low", init_from=run, **AUTO)
    experiment, state, _ = start(config, tmp_path)
    assert experiment.about.class_names == LOW
    assert state.params["head"]["kernel"].shape == (16, 5)


def test_a_head_of_other_classes_cannot_be_kept(run: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(
        digits_dir, "configs/digits.py:low", init_from=run, init_head="keep", **AUTO
    )
    with raises(UserError, "config.init_head", "keep", run, "10", "5"):
        start(config, tmp_path)


def test_a_head_without_names_is_kept_only_when_told(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "published.npz")
    write_npz(path, layout_views(dict(flatten(weights.params)), GOOGLE), {})
    for wish, kept in (("auto", False), ("keep", True)):
        config = small_config(digits_dir, init_from=path, init_head=wish, **AUTO)
        _, state, _ = start(config, tmp_path / wish)
        assert (
            np.array_equal(state.params["head"]["kernel"], weights.params["head"]["kernel"]) == kept
        )


@pytest.mark.parametrize("size", [32, 24])
def test_another_image_size_begins_with_resized_weights(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path, size: int
) -> None:
    config = small_config(digits_dir, init_from=run, image_size=size, **AUTO)
    experiment, state, said = start(config, tmp_path)
    grown = size == 32
    assert experiment.about.config.tokens_mlp_dim == (32 if grown else 8)
    assert experiment.about.image_size == (size, size)
    assert mentions(said, run, "tiled" if grown else "interpolated", "16")
    features = experiment.model.clone(num_classes=0)
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)), jnp.float32)
    params = {k: v for k, v in state.params.items() if k != "head"}
    ours = features.apply({"params": params}, images)
    assert np.isfinite(ours).all()
    if grown:
        small = features.clone(config=dataclasses.replace(features.config, tokens_mlp_dim=8))
        host = {k: v for k, v in weights.params.items() if k != "head"}
        tiles = [images[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
        mean = np.mean([small.apply({"params": host}, tile) for tile in tiles], axis=0)
        np.testing.assert_allclose(ours, mean, atol=2e-5)


def test_the_widths_of_a_config_may_be_those_before_growing(
    run: str, digits_dir: str, tmp_path: Path
) -> None:
    widths: dict[str, Any] = {"model__channels_mlp_dim": 24, "model__tokens_mlp_dim": 8}
    config = small_config(digits_dir, init_from=run, image_size=32, **widths)
    experiment, _, _ = start(config, tmp_path)
    assert experiment.about.config.tokens_mlp_dim == 32


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model__hidden_dim": 8},
            ("num_blocks", "2", "hidden_dim", "16", "--config.model.variant=init_from"),
        ),
        (
            {"model__channels_mlp_dim": 24, "model__gelu": "exact"},
            ("config.init_from", "--config.model.gelu=tanh"),
        ),
        ({**AUTO, "image_size": 18}, ("image_size", "18", "patch_size", "4", "16", "20")),
        ({**AUTO, "model__scan_unroll": 3}, ("model.scan_unroll", "3", "2")),
    ],
)
def test_weights_of_another_model_are_refused(
    run: str, digits_dir: str, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config = small_config(digits_dir, init_from=run, **changes)
    with raises(UserError, *parts):
        start(config, tmp_path)


def test_weights_by_the_name_of_their_variant(digits_dir: str, tmp_path: Path) -> None:
    other = random_weights(MixerConfig(8, 32, 512, 256, 2048), (32, 32))
    run = save_run(other, tmp_path / "run")
    config = small_config(digits_dir, init_from=run, model__channels_mlp_dim=24)
    with raises(UserError, run, "S/32", "--config.model.variant=init_from"):
        start(config, tmp_path)


def test_a_resumed_run_needs_its_beginning_no_more(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    run = save_run(weights, tmp_path / "run")
    config = small_config(digits_dir, init_from=run, image_size=32, **AUTO)
    experiment, state, _ = start(config, tmp_path / "tuned")
    checkpoints = CheckpointManager(str(tmp_path / "tuned"), max_to_keep=1)
    items = {"params": state.params, "optimizer": state.opt_state}
    checkpoints.save(3, items, experiment.metadata | {"loss_window": []})
    checkpoints.close()
    config.init_from = str(tmp_path / "gone")
    beginning = find_init_source(config, str(tmp_path / "tuned"))
    assert beginning is not None
    assert beginning.weights is None
    again = build_experiment(config, open_datasets(config), init_info=beginning.about)
    assert describe_init(again, beginning) == ""
    resumed, _ = restore_or_init(again, CheckpointManager(str(tmp_path / "tuned")), 3, beginning)
    assert_params_equal(jax.device_get(resumed.params), jax.device_get(state.params))
    assert int(resumed.step) == 3


def test_without_init_from_a_run_begins_afresh(digits_dir: str, tmp_path: Path) -> None:
    _, state, said = start(small_config(digits_dir), tmp_path)
    assert said == ""
    assert state.params["stem"]["kernel"].any()
    assert TINY.hidden_dim == state.params["stem"]["kernel"].shape[-1]
