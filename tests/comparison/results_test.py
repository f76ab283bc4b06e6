"""Tests of the files in the workdir of a comparison."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.comparison.results import (
    RESULT_FILE,
    Result,
    check_same_model,
    check_same_run,
    read_result,
    save_json,
    save_result,
)
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config
from mixer_jax.errors import UserError
from mixer_jax.training.workdir import save_config

RESULT = Result("digits test", {"top1": 0.5, "num_examples": 4.0}, 1 / 3)


def test_results_are_read_back(tmp_path: Path) -> None:
    folder = str(tmp_path / "new" / "seed=0")
    assert read_result(folder, "digits test") is None
    save_result(folder, RESULT)
    assert read_result(folder, "digits test") == RESULT
    with pytest.raises(UserError, match="digits test, not on digits train"):
        read_result(folder, "digits train")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": "digits test", "metrics": {}}'])
def test_damaged_results_are_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(UserError, match="Remove it"):
        read_result(str(tmp_path), "digits test")


@pytest.mark.parametrize("state", [RESULT_FILE, "checkpoints/2/_CHECKPOINT_METADATA"])
def test_runs_of_other_settings_are_refused_before_any_is_trained(
    tmp_path: Path, state: str
) -> None:
    config = parse(load_config("digits"))
    folder = str(tmp_path)
    save_config(folder, config)
    other = dataclasses.replace(config, batch_size=64)
    # It has taken no step yet.
    check_same_run(folder, other)
    (tmp_path / state).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / state).write_text("{}")
    check_same_run(folder, config)
    with pytest.raises(UserError, match=r"batch_size.*Choose another --workdir"):
        check_same_run(folder, other)


@pytest.mark.parametrize("change", [{"image_size": [32, 16]}, {"config": {"num_blocks": 3}}])
def test_measurements_of_another_model_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model = {"family": "mixer", "config": {"num_blocks": 2}, "image_size": [16, 16]}
    check_same_model(str(tmp_path), model)
    save_json(str(tmp_path), "model.json", model)
    check_same_model(str(tmp_path), model)
    with pytest.raises(UserError, match="other settings"):
        check_same_model(str(tmp_path), model | change)
