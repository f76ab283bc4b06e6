"""Tests that a model family works through the public commands once it is registered."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.messages import mentions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output of `tests.helpers.second_families`, in a process where both were registered first."""
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, "-m", "tests.helpers.second_families", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_models_and_keys_are_listed(results: dict[str, Any]) -> None:
    assert {"PatchMlp-S", "ConvNet-S", "Mixer-B/16"} <= set(results["models"])
    keys = ("model.expansion", "model.num_filters", "model.tokens_mlp_dim")
    assert mentions(results["help"], *keys)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("patch_mlp", {"num_blocks": 2, "patch_size": 4, "expansion": 3}),
        ("conv_net", {"num_filters": 7}),
    ],
)
def test_family_trains_evaluates_and_loads(
    results: dict[str, Any], family: str, config: dict[str, int]
) -> None:
    result = results[family]
    assert result["exit_code"] == 0
    assert result["config"] == config
    assert result["evaluation"]["step"] == 3
    assert result["evaluation"]["num_examples"] == 1024
    assert result["logits_agree"]
    assert result["shapes_agree"]


def test_intermediates_need_no_stack_and_no_sow(results: dict[str, Any]) -> None:
    assert results["patch_mlp"]["activations"] == ["blocks.0", "blocks.1", "tokens"]
    assert results["conv_net"]["activations"] == ["pre_logits"]


def test_models_without_head_return_features(results: dict[str, Any]) -> None:
    assert results["patch_mlp"]["num_features"] == 8
    assert results["conv_net"]["num_features"] == 6


def test_published_weights_of_any_image_size_load(results: dict[str, Any]) -> None:
    assert results["conv_net"]["converted_agree"]
    assert results["conv_net"]["larger"] == [1, 5]


def test_keys_that_a_family_lacks_are_errors(results: dict[str, Any]) -> None:
    other_family, no_dropout = results["errors"]
    assert mentions(other_family, "model.expansion", "2", "num_filters")
    assert mentions(no_dropout, "model.dropout", "0.5", "ConvNet")
