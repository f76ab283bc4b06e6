"""Tests of what is said of a suite that somebody wrote wrong."""

import dataclasses
import json
from typing import Any

import pytest

from mixer_jax.errors import UserError
from mixer_jax.suites import tasks
from mixer_jax.suites.builtin import SUITES, few_shot_suite
from mixer_jax.suites.run_configs import check_overrides, check_task_overrides
from mixer_jax.suites.tasks import Suite, check_suite
from tests.helpers.messages import raises
from tests.helpers.tiny_suite import HIGH, LOW, PROBE, SUITE


def changed(made: Any, **fields: Any) -> Any:
    """Sets fields to values of any type, as a file without types may."""
    copy = dataclasses.replace(made)
    for name, value in fields.items():
        object.__setattr__(copy, name, value)
    return copy


@pytest.mark.parametrize("suite", [*SUITES.values(), SUITE], ids=lambda suite: suite.name)
def test_our_suites_break_no_rule(suite: Suite) -> None:
    check_suite(suite)
    check_task_overrides(suite)
    check_suite(few_shot_suite("folder:a b/c", "train", "test", (1,), ("knn",)))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "../x"}, ("../x",)),
        ({"name": ""}, ("''",)),
        ({"title": 3}, ("small", "title", "3")),
        ({"paper": "avg6"}, ("small", "paper", "avg6", "imagenet", "real", "avg5", "vtab")),
        ({"tasks": ()}, ("small", "tasks", "FineTune", "Probe")),
        ({"tasks": LOW}, ("small", "tasks", "FineTune", "Probe")),
        ({"tasks": ("low",)}, ("small", "tasks", "FineTune", "Probe")),
        ({"tasks": (LOW, HIGH, LOW)}, ("small", "low")),
    ],
)
def test_wrong_suites(fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(UserError, *parts):
        check_suite(changed(SUITE, **fields))


BOTH = [
    ({"name": "a/b"}, ("a/b",)),
    ({"name": ".a"}, (".a",)),
    ({"name": 3}, ("3",)),
    ({"name": "results.csv"}, ("results.csv",)),
    ({"name": "checkpoints"}, ("checkpoints",)),
    ({"name": "suite.json"}, ("suite.json",)),
    ({"dataset": ""}, ("dataset", "''")),
    ({"test_split": None}, ("test_split", "None")),
    ({"num_classes": -1}, ("num_classes", "-1")),
    ({"seeds": ()}, ("seeds", "()")),
    ({"seeds": (0, 0)}, ("seeds", "(0, 0)")),
    ({"seeds": 3}, ("seeds", "3")),
    ({"seeds": (-1,)}, ("seeds", "(-1,)")),
    ({"num_examples": (1, 2, 3)}, ("num_examples", "(1, 2, 3)", "train_split", "test_split")),
    ({"eval_crop": "round"}, ("eval_crop", "round", "shorter_side", "square", "resize")),
]
ONE_FINE_TUNING = [
    (
        {"num_examples": (1, 2)},
        ("num_examples", "(1, 2)", "choose_split", "validation_split", "train_split", "test_split"),
    ),
    ({"learning_rates": ()}, ("learning_rates", "()")),
    ({"learning_rates": 0.1}, ("learning_rates", "0.1")),
    ({"learning_rates": (0.1, 0.1)}, ("learning_rates", "(0.1, 0.1)")),
    ({"learning_rates": (0.1, 0.1000000001)}, ("learning_rates", "(0.1, 0.1000000001)")),
    ({"learning_rates": (0.0,)}, ("learning_rates", "(0.0,)")),
    ({"learning_rates": (float("inf"),)}, ("learning_rates", "(inf,)")),
    ({"num_steps": 0}, ("num_steps", "0")),
    ({"num_steps": 2.5}, ("num_steps", "2.5")),
    ({"warmup_steps": 7}, ("warmup_steps", "7", "0", "num_steps")),
    ({"batch_size": 0}, ("batch_size", "0")),
    ({"paper": "core_days"}, ("paper", "core_days", "imagenet", "real", "avg5", "vtab")),
    ({"group": None}, ("group", "None")),
    ({"changes": ()}, ("changes", "()")),
    ({"also": ()}, ("also", "()")),
    ({"also": {"test": ("digits", "test")}}, ("also", "test")),
    ({"also": {"validation": ("digits", "test")}}, ("also", "validation")),
    ({"also": {"a.b": ("digits", "test")}}, ("also", "a.b")),
    ({"also": {"other": "digits"}}, ("also", "other", "digits")),
    ({"also": {"other": ("digits",)}}, ("also", "other", "('digits',)")),
]
ONE_PROBE = [
    ({"num_examples": (1, 2, 3, 4)}, ("num_examples", "(1, 2, 3, 4)", "train_split", "test_split")),
    ({"method": "svm"}, ("method", "svm", "few_shot", "linear", "knn")),
    ({"shots": ()}, ("shots", "()")),
    ({"shots": (0,)}, ("shots", "(0,)")),
    ({"shots": (5, 5)}, ("shots", "(5, 5)")),
]


@pytest.mark.parametrize(
    ("task", "fields", "parts"),
    [
        *((HIGH, *case) for case in [*BOTH, *ONE_FINE_TUNING]),
        *((PROBE, *case) for case in [*BOTH, *ONE_PROBE]),
    ],
)
def test_wrong_tasks(task: tasks.Task, fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(UserError, str(fields.get("name", task.name)), *parts) as caught:
        check_suite(changed(SUITE, tasks=(LOW, changed(task, **fields))))
    assert "\n" not in str(caught.value)


def test_lists_and_ranges_are_as_good_as_tuples() -> None:
    task = dataclasses.replace(
        HIGH, learning_rates=[0.01, 0.1], seeds=range(2), num_examples=[656, 73, 729, 167]
    )
    assert task == HIGH
    suite = dataclasses.replace(
        SUITE, tasks=[task, LOW, dataclasses.replace(PROBE, shots=[1, 5], seeds=range(2))]
    )
    assert suite == SUITE
    check_suite(suite)
    assert tasks.from_json(json.loads(json.dumps(tasks.to_json(suite)))) == suite


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": 3}, ("changes", "seed")),
        ({"evals.test.split": "x"}, ("changes", "evals.test.split")),
        ({"recipe.mixupp": 1.0}, ("recipe.mixupp", "recipe.mixup")),
        ({"recipe.mixup": "much"}, ("recipe.mixup", "much")),
        ({"optimizer.momentum": 3}, ("optimizer.momentum", "3.0", "0", "0.999999")),
    ],
)
def test_wrong_changes(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(UserError, "high", *parts):
        check_task_overrides(changed(SUITE, tasks=(changed(HIGH, changes=changes),)))


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
def test_wrong_values_are_told_without_weights(
    key: str, value: str, parts: tuple[str, ...]
) -> None:
    with raises(UserError, f"config.{key}", value, *parts):
        check_overrides(((key, value),))


def test_values_that_some_run_can_have_are_left_to_the_runs() -> None:
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
