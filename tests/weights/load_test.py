"""Tests of loading a checkpoint that was saved before some configuration keys existed."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax import command_line, config, evaluate
from mixer_jax.model.mixer import build_model
from mixer_jax.parallel.sharding import make_mesh
from mixer_jax.weights.checkpoint import Checkpoints
from mixer_jax.weights.load import load_checkpoint

NEW, OLD = 1, 2
CLASS_NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with the same parameters twice: saved with all keys, and when there were fewer."""
    made = config.get_default()
    widths = {"num_blocks": 1, "patch_size": 4, "hidden_dim": 8}
    made.model.update(widths | {"tokens_mlp_dim": 4, "channels_mlp_dim": 8, "variant": "custom"})
    made.preprocess.eval_crop = "whole"
    new, old = made.to_dict(), made.to_dict()
    for section, key in (("preprocess", "exif_orientation"), ("model", "dtype")):
        del old[section][key]
    del old["loader"]
    images = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(build_model(new["model"], 10).init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes["params"])
    workdir = str(tmp_path_factory.mktemp("run"))
    checkpoints = Checkpoints(workdir, keep=2)
    for step, saved in ((NEW, new), (OLD, old)):
        about = {"image_size": 16, "class_names": CLASS_NAMES, "ema": False, "config": saved}
        checkpoints.save(step, {"params": params}, about)
    checkpoints.close()
    return workdir


def test_a_checkpoint_says_the_defaults_of_keys_that_it_lacks(run: str) -> None:
    new, old = (load_checkpoint(run, make_mesh(0, 1), step) for step in (NEW, OLD))
    assert old.model == new.model
    assert old.metadata == new.metadata
    # What it does say stands.
    assert old.metadata["config"]["preprocess"]["eval_crop"] == "whole"


def test_a_checkpoint_of_before_a_key_existed_is_scored(
    run: str, digits_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "set_up_libraries", lambda compilation_cache: None)

    def scores(step: int) -> dict[str, Any]:
        data = ["--dataset=digits", f"--data_dir={digits_dir}"]
        assert evaluate.main([f"--checkpoint={run}", f"--step={step}", "--json", *data]) == 0
        return json.loads(capsys.readouterr().out)

    assert scores(OLD) == scores(NEW) | {"step": OLD}
    assert scores(OLD)["num_examples"] == 360


def test_the_saved_config_itself_is_not_changed() -> None:
    saved: dict[str, Any] = {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    filled = config.with_defaults(saved)
    assert saved == {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    assert filled["model"]["variant"] == "S/16"
    assert filled["model"]["gelu"] == "tanh"
    assert filled["mixture"] == saved["mixture"]
    assert "evals" not in filled
