"""Tests of saving and finding checkpoints, with real orbax on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.manager import CheckpointManager, abstract_state, save_params_streaming
from mixer_jax.checkpoints.resolve import find_checkpoint, list_steps
from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.errors import UserError
from mixer_jax.training import loop
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init
from mixer_jax.training.setup import Experiment, build_experiment
from mixer_jax.training.step import TrainState
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

# What runs said of themselves before `About`, word for word but for the config's sections.
OLD_METADATA: dict[str, Any] = {
    "variant": "custom",
    "widths": {
        "num_blocks": 1,
        "patch_size": 4,
        "hidden_dim": 16,
        "tokens_mlp_dim": 8,
        "channels_mlp_dim": 16,
    },
    "gelu": "tanh",
    "image_size": 16,
    "class_names": list(DIGITS),
    "preprocess": {"eval_crop": "whole", "pixels": [-1, 1]},
    "loss": "softmax",
    "ema": False,
    "num_steps": 20,
    "num_train_examples": 1437,
    "config": {
        "seed": 3,
        "dataset": {"name": "digits"},
        "model": {"variant": "custom", "dtype": "bfloat16"},
        "preprocess": {"eval_crop": "whole"},
    },
    "versions": {"mixer_jax": "0.1.0", "jax": "0.6.0"},
    "loss_window": [0.5, 0.25],
}
Run = tuple[Experiment, TrainState, Path]


def make_tree(seed: int) -> Any:
    values = np.random.default_rng(seed).normal(size=(16, 8))
    return {"kernel": jnp.asarray(values, jnp.float32), "count": jnp.int32(seed)}


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with checkpoints of steps 9, 10 and 100, of which two are kept."""
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, {"params": make_tree(step)}, {"note": f"step {step}"})
    checkpoints.close()
    return str(tmp_path)


def test_the_newest_are_kept_and_read_back_to_the_bit(run: str) -> None:
    assert list_steps(run) == [10, 100]
    checkpoints = CheckpointManager(run)
    assert checkpoints.latest_step() == 100
    for step in (10, 100):
        assert checkpoints.metadata(step) == {"note": f"step {step}"}
        restored = checkpoints.restore(step, {"params": make_tree(0)})["params"]
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make_tree(step)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_restore_lays_arrays_out_as_asked(run: str) -> None:
    mesh = make_mesh(1, 8)
    tree = make_tree(0)
    target = abstract_state(tree, state_sharding(tree, mesh))
    restored = CheckpointManager(run).restore(100, {"params": target})["params"]
    assert restored["kernel"].sharding == target["kernel"].sharding
    np.testing.assert_array_equal(restored["kernel"], make_tree(100)["kernel"])


def test_unfinished_saves_are_not_taken_for_checkpoints(run: str) -> None:
    unfinished = Path(run) / "checkpoints" / "200.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "params").mkdir()
    assert list_steps(run) == [10, 100]
    assert CheckpointManager(run).latest_step() == 100
    # Reading leaves it; a run that goes on clears it away.
    assert unfinished.exists()
    checkpoints = CheckpointManager(run, max_to_keep=2)
    checkpoints.save(200, {"params": make_tree(200)}, {})
    checkpoints.close()
    assert not unfinished.exists()
    assert list_steps(run) == [100, 200]


@pytest.mark.parametrize("suffix", ["", "/", "/checkpoints", "/checkpoints/100"])
def test_checkpoints_are_found_by_any_of_their_names(run: str, suffix: str) -> None:
    assert find_checkpoint(run + suffix) == (run, 100)


def test_a_step_can_be_named(run: str) -> None:
    assert find_checkpoint(run, step=10) == (run, 10)
    assert find_checkpoint(f"{run}/checkpoints/10") == (run, 10)


def test_missing_checkpoints_are_errors(run: str, tmp_path: Path) -> None:
    with raises(UserError, run) as caught:
        find_checkpoint(run, step=11)
    # The path may have numbers in it.
    assert mentions(str(caught.value).replace(run, ""), "11", "10", "100")
    with raises(UserError, str(tmp_path / "nowhere")):
        find_checkpoint(str(tmp_path / "nowhere"))


def test_folders_that_only_look_like_checkpoints(run: str) -> None:
    (Path(run) / "checkpoints" / "300").mkdir()
    assert list_steps(run) == [10, 100]
    shutil.rmtree(Path(run) / "checkpoints" / "100" / "params")
    with raises(UserError, f"{run}/checkpoints/100", "params"):
        CheckpointManager(run).restore(100, {"params": make_tree(0)})


def save_small_run(
    data_dir: str, workdir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Run:
    """Saves what a run of configs/digits.py begins with as its step 4; `change`: its metadata."""
    config = small_config(data_dir, **NO_REGULARIZATION)
    experiment = build_experiment(config, open_datasets(config), jax.devices()[:1])
    state = experiment.create_state()
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    changed = experiment._replace(metadata=change(experiment.metadata))
    loop.save(changed, checkpoints, state, 4, changed.metadata.get("loss_window", []))
    checkpoints.close()
    return experiment, state, workdir


def resume(experiment: Experiment, workdir: Path) -> tuple[TrainState, list[float]]:
    beginning = find_init_source(experiment.config, str(workdir))
    assert beginning is not None
    assert beginning.model_info.config == experiment.model_info.config
    return restore_or_init(experiment, CheckpointManager(str(workdir)), 4, beginning)


def test_runs_of_before_about_load_and_go_on(digits_dir: str, tmp_path: Path) -> None:
    experiment, state, run = save_small_run(digits_dir, tmp_path, lambda _: OLD_METADATA)
    loaded = load_checkpoint(str(run))
    assert_params_equal(loaded.params, state.params)
    about = loaded.model_info
    assert (about.variant, about.gelu, about.loss) == ("custom", "tanh", "softmax")
    assert (about.image_size, about.num_classes) == ((16, 16), 10)
    assert about.class_names == DIGITS
    # The last is the default: the key did not exist.
    assert (about.eval_crop, about.dtype, about.exif_orientation) == ("resize", "bfloat16", False)
    assert loaded.train_config is not None
    assert loaded.train_config["dataset"]["name"] == "digits"
    resumed, window = resume(experiment, run)
    assert window == [0.5, 0.25]
    assert int(resumed.step) == 4
    assert_params_equal(resumed.params, state.params)


@pytest.mark.parametrize(
    "lacking", ["gelu", "preprocess", "config", "ema", "num_steps", "class_names", "loss_window"]
)
def test_old_metadata_that_lack_something_are_told(
    lacking: str, digits_dir: str, tmp_path: Path
) -> None:
    said = {name: value for name, value in OLD_METADATA.items() if name != lacking}
    experiment, _, run = save_small_run(digits_dir, tmp_path, lambda _: said)
    if lacking == "loss_window":
        path = run / "checkpoints" / "4" / "metadata" / "metadata"
        path.write_text(json.dumps(said))
    if lacking not in ("num_steps", "loss_window"):
        with raises(UserError, f"{run}/checkpoints/4", lacking):
            load_checkpoint(str(run))
    if lacking != "ema":
        with raises(UserError, lacking):
            resume(experiment, run)


def cut_off(step: Path) -> None:
    for path in (step / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(step: Path) -> None:
    for path in (step / "params").rglob("d/*"):
        path.write_bytes(b"x" * path.stat().st_size)


def write_metadata(text: str) -> Callable[[Path], None]:
    def write(step: Path) -> None:
        (step / "metadata" / "metadata").write_text(text)

    return write


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_off, ""),
        (spoil, ""),
        (lambda step: shutil.rmtree(step / "params"), "params"),
        (write_metadata("{"), ""),
        (write_metadata("[1]"), "JSON"),
        (lambda step: (step / "metadata" / "metadata").unlink(), "metadata"),
        (lambda step: shutil.rmtree(step / "metadata"), "metadata"),
    ],
    ids=["cut off", "spoiled", "no arrays", "half JSON", "a list", "no JSON", "no metadata"],
)
def test_damaged_checkpoints_are_told_in_one_line(
    damage: Callable[[Path], None], named: str, digits_dir: str, tmp_path: Path
) -> None:
    experiment, _, run = save_small_run(digits_dir, tmp_path, lambda said: said)
    load_checkpoint(str(run))
    resume(experiment, run)
    damage(run / "checkpoints" / "4")
    parts = [f"{run}/checkpoints/4", *named.split()]
    for use in (lambda: load_checkpoint(str(run)), lambda: resume(experiment, run)):
        with raises(UserError, *parts) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_what_is_written_frugally_is_a_checkpoint_like_others(tmp_path: Path) -> None:
    weights = random_weights()
    save_params_streaming(
        str(tmp_path), 0, weights.params, {"model_info": weights.model_info.to_dict(), "ema": 0}
    )
    assert_params_equal(load_checkpoint(str(tmp_path)).params, weights.params)
    one_by_one = dict(CheckpointManager(str(tmp_path)).iter_restore(0, "params"))
    assert_params_equal(tree.unflatten(one_by_one), weights.params)
    assert all(type(array) is np.ndarray for array in one_by_one.values())
