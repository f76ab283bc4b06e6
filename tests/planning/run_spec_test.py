"""Tests of runs in numbers, and of settings resolved for a platform."""

import math

import jax
import numpy as np
import pytest

from mixer_jax.config.config import parse, resolve_num_steps
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.planning.cost_model import estimate_memory
from mixer_jax.planning.run_spec import placeholder_datasets, resolve_for_platform, run_spec
from mixer_jax.training.setup import build_experiment
from tests.helpers.messages import raises
from tests.helpers.tiny_run import FAMILY_OVERRIDES, small_config


def test_run_spec_of_config() -> None:
    flags = ["--config.recipe.grad_accum_steps=1"]
    config = resolve_for_platform(
        parse(load_config_with_overrides("configs/mixer_l16_i21k.py", flags)), "tpu"
    )
    assert config.model.dtype == "bfloat16"
    dataset = placeholder_datasets(config).train
    assert (len(dataset), dataset.num_classes) == (14_055_151, 21_843)
    run = run_spec(config, num_devices=64)
    assert (run.num_classes, run.num_steps) == (
        dataset.num_classes,
        resolve_num_steps(config, len(dataset)),
    )
    assert run.num_params == 229_560_243
    assert run.mixup
    assert (run.images_per_device, run.itemsize) == (64, 2)


@pytest.mark.parametrize("family", FAMILY_OVERRIDES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "muon", "adafactor"])
def test_moments_are_the_arrays_of_the_state(name: str, family: str, digits_dir: str) -> None:
    config = small_config(
        digits_dir,
        optimizer__name=name,
        recipe__ema_decay=0.9,
        mesh__fsdp=4,
        **FAMILY_OVERRIDES[family],
    )
    config = resolve_for_platform(config, "cpu")
    experiment = build_experiment(config, placeholder_datasets(config))
    state = experiment.state_shape
    leaves = jax.tree.leaves((state.opt_state, state.ema_params))
    # Without counters, and the three coefficients that optax stores in the state of Muon.
    arrays = [x for x in leaves if x.dtype == np.float32 and x.shape != (3,)]
    run = run_spec(config, num_devices=8)
    assert sorted(shape for _, shape in run.moments) == sorted(x.shape for x in arrays)
    num_bytes = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in arrays)
    assert estimate_memory(run).moments == num_bytes


@pytest.mark.parametrize(("name", "paired"), [("mixup", True), ("cutmix", True), ("", False)])
def test_run_spec_has_the_partners_of_mixup_and_cutmix(name: str, paired: bool) -> None:
    flags = [f"--config.recipe.{key}={1.0 if key == name else 0.0}" for key in ("mixup", "cutmix")]
    config = parse(load_config_with_overrides("configs/digits.py", flags))
    assert run_spec(resolve_for_platform(config, "tpu"), num_devices=1).mixup == paired


def test_run_spec_rejects_runs_shorter_than_their_warmup() -> None:
    flags = ["--config.num_steps=0", "--config.num_epochs=1", "--config.batch_size=100"]
    flags += ["--config.optimizer.warmup_steps=15", "--config.dataset.num_examples=0"]
    config = parse(load_config_with_overrides("configs/digits.py", flags))
    with raises(UserError, "config.optimizer.warmup_steps", "15", "14"):
        run_spec(resolve_for_platform(config, "tpu"), num_devices=1)


@pytest.mark.parametrize(("classes", "num_classes"), [("all", 10), ("low", 5), ("high", 5)])
def test_placeholder_datasets_match_digits(classes: str, num_classes: int, digits_dir: str) -> None:
    config = parse(load_config_with_overrides(f"configs/digits.py:{classes}", []))
    placeholder = placeholder_datasets(resolve_for_platform(config, "tpu")).train
    dataset = open_dataset(f"digits/{classes}", "train", digits_dir)
    assert (len(placeholder), placeholder.num_classes) == (len(dataset), num_classes)


@pytest.mark.parametrize(
    ("platform", "flags", "expected"),
    [
        ("tpu", [], (1, "dots")),
        ("tpu", ["--config.model.backend=mosaic"], (0, "none")),
        # Custom kernels do not support dropout.
        ("tpu", ["--config.model.backend=mosaic", "--config.model.dropout=0.1"], (1, "dots")),
        ("gpu", [], (0, "none")),
    ],
)
def test_resolve_for_platform_resolves_unroll_and_remat(
    platform: str, flags: list[str], expected: tuple[int, str]
) -> None:
    config = parse(load_config_with_overrides("configs/mixer_l16_i21k.py", flags))
    model = resolve_for_platform(config, platform).model
    assert (model.scan_unroll, model.remat) == expected
