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
    ("fields", "message"),
    [
        ({"name": "../x"}, r"suite '\.\./x' cannot be the name of a folder; use letters"),
        ({"name": ""}, "suite '' cannot be"),
        ({"title": 3}, "suite small: title=3 cannot be"),
        ({"paper": "avg6"}, r"suite small: paper='avg6' cannot be; choose imagenet, real, avg5, v"),
        ({"tasks": ()}, r"suite small: tasks is no list of FineTune and Probe; give at least one"),
        ({"tasks": LOW}, "tasks is no list"),
        ({"tasks": ("low",)}, "tasks is no list"),
        ({"tasks": (LOW, HIGH, LOW)}, "suite small has several tasks 'low'; give each its own"),
    ],
)
def test_wrong_suites(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_suite(changed(SUITE, **fields))


BOTH = [
    ({"name": "a/b"}, "task 'a/b' cannot be the name of a folder"),
    ({"name": ".a"}, "and no dot at the beginning"),
    ({"name": 3}, "task 3 cannot be"),
    ({"name": "results.csv"}, r"task results\.csv: files of a suite are called so; choose another"),
    ({"name": "checkpoints"}, "task checkpoints: files of a suite"),
    ({"name": "suite.json"}, "files of a suite"),
    ({"dataset": ""}, "dataset='' cannot be; pass a name"),
    ({"test_split": None}, "test_split=None cannot be"),
    ({"num_classes": -1}, "num_classes=-1 cannot be"),
    ({"seeds": ()}, r"seeds=\(\) cannot be; list whole numbers from 0, each once"),
    ({"seeds": (0, 0)}, r"seeds=\(0, 0\) cannot be"),
    ({"seeds": 3}, "seeds=3 cannot be"),
    ({"seeds": (-1,)}, r"seeds=\(-1,\) cannot be"),
    ({"num_examples": (1, 2, 3)}, r"num_examples=\(1, 2, 3\) cannot be; list one for each of"),
    ({"eval_crop": "round"}, "eval_crop='round' cannot be; choose shorter_side, square"),
]
ONE_FINE_TUNING = [
    ({"num_examples": (1, 2)}, "one for each of choose_split, validation_split, train_split, t"),
    ({"learning_rates": ()}, r"learning_rates=\(\) cannot be; list numbers above 0, each once"),
    ({"learning_rates": 0.1}, r"learning_rates=0\.1 cannot be"),
    ({"learning_rates": (0.1, 0.1)}, "each once"),
    ({"learning_rates": (0.1, 0.1000000001)}, "that differ in six digits"),
    ({"learning_rates": (0.0,)}, "numbers above 0"),
    ({"learning_rates": (float("inf"),)}, "numbers above 0"),
    ({"num_steps": 0}, "task high: num_steps=0 cannot be; pass 1 or more"),
    ({"num_steps": 2.5}, r"num_steps=2\.5 cannot be"),
    ({"warmup_steps": 7}, "warmup_steps=7 cannot be; pass 0 to num_steps"),
    ({"batch_size": 0}, "batch_size=0 cannot be"),
    ({"paper": "core_days"}, "paper='core_days' cannot be"),
    ({"group": None}, "group=None cannot be"),
    ({"changes": ()}, r"changes=\(\) cannot be"),
    ({"also": ()}, r"also=\(\) cannot be"),
    ({"also": {"test": ("digits", "test")}}, "also has 'test', as a split of its own; name it"),
    ({"also": {"validation": ("digits", "test")}}, "also has 'validation'"),
    ({"also": {"a.b": ("digits", "test")}}, "also has 'a.b'; use letters"),
    ({"also": {"a": "digits"}}, r"also has a='digits'; pass \(data set, split\)"),
    ({"also": {"a": ("digits",)}}, r"also has a=\('digits',\)"),
]
ONE_PROBE = [
    ({"num_examples": (1, 2, 3, 4)}, "one for each of train_split, test_split"),
    ({"method": "svm"}, "task probe: method='svm' cannot be; choose few_shot, linear, knn"),
    ({"shots": ()}, r"shots=\(\) cannot be; list numbers from 1, each once"),
    ({"shots": (0,)}, r"shots=\(0,\) cannot be"),
    ({"shots": (5, 5)}, r"shots=\(5, 5\) cannot be"),
]


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        *((HIGH, *case) for case in [*BOTH, *ONE_FINE_TUNING]),
        *((PROBE, *case) for case in [*BOTH, *ONE_PROBE]),
    ],
)
def test_wrong_tasks(task: tasks.Task, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
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
    ("changes", "message"),
    [
        ({"seed": 3}, "task high: changes has 'seed', which a suite sets itself, for each of its"),
        ({"evals.test.split": "x"}, "task high: changes has 'evals.test.split', which"),
        ({"recipe.mixupp": 1.0}, r"task high: config\.recipe\.mixupp is no configuration key; did"),
        ({"recipe.mixup": "much"}, r"task high: config\.recipe\.mixup='much' is not a number"),
        ({"optimizer.momentum": 3}, r"task high: config\.optimizer\.momentum=3\.0 is out of range"),
    ],
)
def test_wrong_changes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_task_overrides(changed(SUITE, tasks=(changed(HIGH, changes=changes),)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_epochs", "3", "a suite sets num_epochs itself"),
        ("distributed", "maybe", r"config\.distributed='maybe' is unknown; choose auto or yes or"),
        ("loader.num_threads", "many", "'many' is not a whole number"),
        ("recipe.grad_accum_steps", "0", r"grad_accum_steps=0 is out of range; pass 1 or more"),
        ("model.hidden_dim", "8", "has no say with config.model.variant='init_from'"),
    ],
)
def test_wrong_values_are_told_without_weights(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match=r"config\.batch_size=4 is not divisible by config\.recipe"):
        check_overrides((("batch_size", "4"), ("recipe.grad_accum_steps", "3")))
