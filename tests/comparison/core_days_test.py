"""Tests of core-days, planned in a separate process. GPUs need no compiler."""

from pathlib import Path

import pytest

from mixer_jax.comparison.core_days import plan_core_days
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.errors import UserError
from mixer_jax.planning.planner import make_plan
from mixer_jax.planning.topology import parse_topology
from tests.helpers.tiny_comparison import write_config


def test_core_days_are_those_of_the_plan(tmp_path: Path) -> None:
    config = parse(load_config_with_overrides(str(write_config(tmp_path)), []))
    plan = make_plan(config, parse_topology("h100:2"))
    assert plan.cost is not None
    assert plan_core_days(config, 5, 32, "h100:2") == plan.cost.core_days > 0


def test_errors_of_the_plan_are_raised_here(tmp_path: Path) -> None:
    config = parse(load_config_with_overrides(str(write_config(tmp_path)), []))
    with pytest.raises(UserError, match=r"batch_size.* got 8"):
        plan_core_days(config, 5, 32, "h100:16")


@pytest.mark.slow
def test_a_model_that_does_not_fit_has_none(tmp_path: Path) -> None:
    large = ["--config.model.hidden_dim=20000", "--config.model.channels_mlp_dim=600000"]
    config = parse(load_config_with_overrides(str(write_config(tmp_path)), large))
    assert plan_core_days(config, 5, 32, "h100:1") is None
