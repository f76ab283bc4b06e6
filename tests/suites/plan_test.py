"""Tests of plans: configs of the runs, config overrides, selection of tasks."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from mixer_jax.config.config import flatten
from mixer_jax.config.loading import load_config
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family, parse_model_name
from mixer_jax.suites.builtin import AVG5, SUITES
from mixer_jax.suites.datasets import choose_image_size
from mixer_jax.suites.plan import (
    Run,
    TransferPlan,
    check_overrides,
    check_task_overrides,
    default_config,
    select_tasks,
    validate_run_configs,
)
from mixer_jax.suites.tasks import FineTuneTask, Suite, for_model
from tests.helpers.messages import raises
from tests.helpers.tiny_suite import HIGH, LARGE_INFO, LOW, PROBE, SUITE, make_plan
from tests.suites.tasks_test import replace_fields

OVERRIDES = (
    ("optimizer.momentum", "0.5"),
    ("optimizer.momentum", "0.8"),
    ("loader.num_threads", "3"),
)


def test_runs_vary_learning_rate_seed_and_splits() -> None:
    plan = make_plan(SUITES["avg5"], 224, model_info=LARGE_INFO)
    task = AVG5[1]
    sweep, final = plan.sweep_runs(task), plan.final_runs(task, 0.03)
    assert list(sweep) == [0.001, 0.003, 0.01, 0.03]
    assert list(final) == [0, 1, 2]
    for rate, run in sweep.items():
        assert run.config.optimizer.learning_rate == rate
        assert (run.config.seed, run.config.dataset.train_split) == (0, "train[:98%]")
        assert {k: v.split for k, v in run.config.evals.items()} == {"validation": "train[98%:]"}
    for seed, run in final.items():
        assert (run.config.seed, run.config.optimizer.learning_rate) == (seed, 0.03)
        assert run.config.dataset.train_split == "train"
        assert {k: v.split for k, v in run.config.evals.items()} == {"test": "test"}
    folders = [run.folder for run in [*sweep.values(), *final.values()]]
    assert len(set(folders)) == 7


def test_sweep_runs_is_empty_for_a_single_rate() -> None:
    assert make_plan().sweep_runs(LOW) == {}


def test_final_runs_equal_the_fine_tuning_configs() -> None:
    """The protocol itself is asserted in configs_test."""
    for task in AVG5:
        for size in (224, 448):
            config = load_config(f"configs/finetune_{task.name}.py:{size}")
            # Placeholders for synthetic data.
            assert config.dataset.num_classes == task.num_classes
            assert config.dataset.num_examples == task.num_examples[2]
            plan = make_plan(SUITES["avg5"], size, model_info=LARGE_INFO)
            run = plan.final_runs(task, 0.01)[0]
            expected, found = flatten(config), flatten(ConfigDict(run.config.to_dict()))
            differing = {key for key in expected.keys() & found if expected[key] != found[key]}
            assert differing <= {
                "init_from",
                "checkpoint.every_steps",
                "checkpoint.keep",
                "tensorboard",
                "evals.test.every_steps",
                "dataset.num_classes",
                "dataset.num_examples",
            }, (task.name, size)


def make_model_plan(suite: Suite, model: str, requested: str = "native") -> TransferPlan:
    """Creates the plan for a checkpoint of 224 px by the model's full name."""
    family, variant = parse_model_name(model)
    config = get_family(family).get_config(variant)
    info = dataclasses.replace(LARGE_INFO, family=family, variant=variant, config=config)
    suite = for_model(suite, family, model)
    plan = make_plan(suite, model_info=info)
    for task in suite.tasks:
        plan.image_sizes[task.name] = choose_image_size(task, requested, info, [])
    return plan


def differing_keys(config: ConfigDict, run: Run) -> set[str]:
    """Returns the keys that a config and a run have with other values, other than bookkeeping."""
    expected, found = flatten(config), flatten(ConfigDict(run.config.to_dict()))
    keys = {key for key in expected.keys() & found if expected[key] != found[key]}
    ignored = ("checkpoint.", "dataset.num_", "evals.", "init_from", "tensorboard")
    return {key for key in keys if not key.startswith(ignored)}


@pytest.mark.parametrize("model", ["BiT-R50x1", "BiT-R152x4"])
def test_runs_of_bit_equal_its_fine_tuning_configs(model: str) -> None:
    plan = make_model_plan(SUITES["avg5"], model)
    size = 480 if model == "BiT-R152x4" else 384
    assert plan.largest_image_size == size
    for task in AVG5:
        resolved = next(t for t in plan.suite.tasks if t.name == task.name)
        assert isinstance(resolved, FineTuneTask)
        assert plan.sweep_runs(resolved) == {}
        run = plan.final_runs(resolved, resolved.learning_rates[0])[0]
        assert not differing_keys(load_config(f"finetune_bit:{task.name},{size}"), run)


def test_runs_of_vit_equal_its_fine_tuning_configs() -> None:
    plan = make_model_plan(SUITES["avg5"], "ViT-B/16", "384")
    for task in AVG5:
        resolved = next(t for t in plan.suite.tasks if t.name == task.name)
        assert isinstance(resolved, FineTuneTask)
        rates = (0.003, 0.01, 0.03) if task is AVG5[0] else (0.001, 0.003, 0.01, 0.03)
        assert tuple(plan.sweep_runs(resolved)) == rates
        run = plan.final_runs(resolved, 0.01)[0]
        # The Mixer paper evaluates ViT with its own crop.
        assert differing_keys(load_config(f"finetune_vit:{task.name}"), run) == {
            "preprocess.eval_crop"
        }
        assert run.config.preprocess.eval_crop == "shorter_side"


def test_vtab_runs_of_bit_crop_and_flip_only_where_labels_stay() -> None:
    plan = make_model_plan(SUITES["vtab1k"], "BiT-R50x1")
    for task in plan.suite.tasks:
        assert isinstance(task, FineTuneTask)
        (run, *_) = plan.final_runs(task, 0.003).values()
        preprocess = run.config.preprocess
        assert (run.config.num_steps, run.config.optimizer.decay_type) == (500, "staircase")
        assert (run.config.recipe.mixup, preprocess.eval_crop) == (0.0, "resize")
        size, before = (384, 448) if task.is_large_image else (128, 160)
        is_cropped = task.name not in {
            "clevr_count", "clevr_distance", "dmlab", "dsprites_position", "kitti_distance"
        }  # fmt: skip
        assert run.config.image_size == size
        crop = ("bilinear_crop", before) if is_cropped else ("resize", 0)
        assert (preprocess.train_crop, preprocess.resize_size) == crop
        flipped = task.name not in {
            "dsprites_orientation", "dsprites_position", "smallnorb_azimuth"
        }  # fmt: skip
        assert preprocess.flip == flipped


def test_vtab_runs_of_vit_have_one_learning_rate_and_size() -> None:
    plan = make_model_plan(SUITES["vtab1k"], "ViT-L/16")
    assert set(plan.image_sizes.values()) == {384}
    assert all(not plan.sweep_runs(t) for t in plan.suite.tasks if isinstance(t, FineTuneTask))
    assert set(make_model_plan(SUITES["vtab1k"], "ViT-L/16", "224").image_sizes.values()) == {224}


def test_a_tasks_own_size_is_rounded_to_whole_patches() -> None:
    plan = make_model_plan(SUITES["vtab1k"], "ViT-H/14")
    assert set(plan.image_sizes.values()) == {378}
    task = plan.suite.tasks[0]
    assert isinstance(task, FineTuneTask)
    assert plan.final_runs(task, 0.01)[0].config.image_size == 378
    with raises(UserError, "384", "14", "378", "392"):
        make_model_plan(SUITES["vtab1k"], "ViT-H/14", "384")


def test_another_image_size_changes_the_size_before_the_crop() -> None:
    plan = make_model_plan(SUITES["avg5"], "BiT-R50x1", "224")
    (task, *_) = plan.suite.tasks
    assert isinstance(task, FineTuneTask)
    run = plan.final_runs(task, 0.003)[0]
    assert (run.config.image_size, run.config.preprocess.resize_size) == (224, 0)


def test_final_runs_evaluate_with_real_labels() -> None:
    plan = make_plan(SUITES["imagenet"], 224, model_info=LARGE_INFO)
    (run, *_) = plan.final_runs(AVG5[0], 0.03).values()
    assert {k: (v.dataset, v.split) for k, v in run.config.evals.items()} == {
        "test": ("", "validation"),
        "real": ("imagenet2012_real", "validation"),
    }


def test_protocol_overrides_exclude_resumable_keys() -> None:
    assert make_plan(overrides=OVERRIDES).protocol_overrides == (("optimizer.momentum", "0.8"),)
    assert default_config(OVERRIDES).loader.num_threads == 3
    assert default_config(()).eval_batch_size == 256


@pytest.mark.parametrize("key", ["seed", "optimizer.learning_rate", "evals.test.split"])
def test_check_overrides_rejects_reserved_keys(key: str) -> None:
    with raises(UserError, f"--config.{key}=1"):
        check_overrides(((key, "1"),))


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("num_epochs", "3", ()),
        ("distributed", "maybe", ("auto", "yes", "no")),
        ("loader.num_threads", "many", ()),
        ("recipe.grad_accum_steps", "0", ("1",)),
        ("model.hidden_dim", "8", ("config.model.variant", "init_from")),
    ],
)
def test_check_overrides_rejects_invalid_values(
    key: str, value: str, parts: tuple[str, ...]
) -> None:
    with raises(UserError, f"config.{key}", value, *parts):
        check_overrides(((key, value),))


def test_check_overrides_accepts_values_that_are_valid_in_some_run() -> None:
    for key, value in [
        ("recipe.grad_accum_steps", "3"),
        ("optimizer.warmup_steps", "9"),
        ("num_steps", "2"),
        ("batch_size", "1"),
        ("optimizer.decay_type", "none"),
    ]:
        check_overrides(((key, value),))
    with raises(UserError, "config.batch_size", "4", "config.recipe.grad_accum_steps", "3"):
        check_overrides((("batch_size", "4"), ("recipe.grad_accum_steps", "3")))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"seed": 3}, ("config_overrides", "seed")),
        ({"evals.test.split": "x"}, ("config_overrides", "evals.test.split")),
        ({"recipe.mixupp": 1.0}, ("recipe.mixupp", "recipe.mixup")),
        ({"recipe.mixup": "much"}, ("recipe.mixup", "much")),
        ({"optimizer.momentum": 3}, ("optimizer.momentum", "3.0", "0", "0.999999")),
    ],
)
def test_check_task_overrides_names_the_task(
    overrides: dict[str, Any], parts: tuple[str, ...]
) -> None:
    task = replace_fields(HIGH, config_overrides=overrides)
    with raises(UserError, "high", *parts):
        check_task_overrides(replace_fields(SUITE, tasks=(task,)))


def test_validate_run_configs_checks_rules_between_keys() -> None:
    validate_run_configs(make_plan(), SUITE.tasks)
    with raises(UserError, "config.num_stepz", "num_steps"):
        validate_run_configs(make_plan(overrides=(("num_stepz", "1"),)), SUITE.tasks)
    with raises(UserError, "config.num_steps", "config.num_epochs", "0"):
        validate_run_configs(make_plan(overrides=(("num_steps", "0"),)), SUITE.tasks)


def test_largest_image_size_is_that_of_fine_tuning() -> None:
    plan = make_plan(Suite("two", "two", (AVG5[0], PROBE)), 224, model_info=LARGE_INFO)
    plan.image_sizes[PROBE.name] = 448
    assert plan.largest_image_size == 224
    assert make_plan(Suite("one", "one", (PROBE,)), 16).largest_image_size == 16


@pytest.mark.parametrize("count", [1, 2, 5, 19])
def test_select_tasks_shards_are_disjoint_and_complete(count: int) -> None:
    suite = SUITES["vtab1k"]
    shards = [select_tasks(suite, (), (index, count)) for index in range(1, count + 1)]
    names = sorted(task.name for shard in shards for task in shard)
    assert names == sorted(task.name for task in suite.tasks)


def test_select_tasks_by_name() -> None:
    suite = SUITES["vtab1k"]
    with raises(UserError, "--shard=20/20", "19"):
        select_tasks(suite, (), (20, 20))
    with raises(UserError, "--tasks", "dtdd", "vtab1k", *(task.name for task in suite.tasks)):
        select_tasks(suite, ("dtd", "dtdd"), (1, 1))
    assert [task.name for task in select_tasks(suite, ("pets", "dtd"), (1, 1))] == ["dtd", "pets"]
