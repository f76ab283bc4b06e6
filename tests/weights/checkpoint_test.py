"""Tests of saving and finding checkpoints, with real orbax on disk."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.parallel.sharding import make_mesh, state_sharding
from mixer_jax.weights.checkpoint import Checkpoints, abstract
from mixer_jax.weights.steps import find_checkpoint, list_steps


def make_tree(seed: int) -> Any:
    values = np.random.default_rng(seed).normal(size=(16, 8))
    return {"kernel": jnp.asarray(values, jnp.float32), "count": jnp.int32(seed)}


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with checkpoints of steps 9, 10 and 100, of which two are kept."""
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, {"params": make_tree(step)}, {"note": f"step {step}"})
    checkpoints.close()
    return str(tmp_path)


def test_the_newest_are_kept_and_read_back_to_the_bit(run: str) -> None:
    assert list_steps(run) == [10, 100]
    checkpoints = Checkpoints(run)
    assert checkpoints.latest_step() == 100
    for step in (10, 100):
        assert checkpoints.metadata(step) == {"note": f"step {step}"}
        restored = checkpoints.restore(step, {"params": make_tree(0)})["params"]
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make_tree(step)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_restore_lays_arrays_out_as_asked(run: str) -> None:
    mesh = make_mesh(1, 8)
    tree = make_tree(0)
    target = abstract(tree, state_sharding(tree, mesh))
    restored = Checkpoints(run).restore(100, {"params": target})["params"]
    assert restored["kernel"].sharding == target["kernel"].sharding
    np.testing.assert_array_equal(restored["kernel"], make_tree(100)["kernel"])


def test_unfinished_saves_are_not_taken_for_checkpoints(run: str) -> None:
    unfinished = Path(run) / "checkpoints" / "200.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "params").mkdir()
    assert list_steps(run) == [10, 100]
    assert Checkpoints(run).latest_step() == 100
    # Reading leaves it; a run that goes on clears it away.
    assert unfinished.exists()
    checkpoints = Checkpoints(run, keep=2)
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
    with pytest.raises(UserError, match="has no step 11; it has 10, 100"):
        find_checkpoint(run, step=11)
    with pytest.raises(UserError, match="nowhere' holds no checkpoint"):
        find_checkpoint(str(tmp_path / "nowhere"))


def test_folders_that_only_look_like_checkpoints(run: str) -> None:
    (Path(run) / "checkpoints" / "300").mkdir()
    assert list_steps(run) == [10, 100]
    shutil.rmtree(Path(run) / "checkpoints" / "100" / "params")
    with pytest.raises(UserError, match="step 100 lacks params: it is incomplete"):
        Checkpoints(run).restore(100, {"params": make_tree(0)})
