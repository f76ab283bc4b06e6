"""Tests of tasks and suites: validation and JSON form."""

import dataclasses
import json
from typing import Any

import pytest

from mixer_jax.errors import UserError
from mixer_jax.suites import tasks
from mixer_jax.suites.builtin import SUITES, few_shot_suite
from mixer_jax.suites.plan import check_task_overrides
from mixer_jax.suites.tasks import Suite, check_suite
from tests.helpers.messages import raises
from tests.helpers.tiny_suite import HIGH, LOW, PROBE, SUITE


def replace_fields(record: Any, **fields: Any) -> Any:
    """Returns a copy with fields of any type, as an untyped file may have."""
    copy = dataclasses.replace(record)
    for name, value in fields.items():
        object.__setattr__(copy, name, value)
    return copy


@pytest.mark.parametrize("suite", [*SUITES.values(), SUITE], ids=lambda suite: suite.name)
def test_check_suite_accepts_built_in_suites(suite: Suite) -> None:
    check_suite(suite)
    check_task_overrides(suite)
    check_suite(few_shot_suite("folder:a b/c", "train", "test", (1,), ("knn",)))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "../x"}, ("../x",)),
        ({"name": ""}, ("''",)),
        ({"title": 3}, ("tiny", "title", "3")),
        (
            {"paper_column": "avg6"},
            ("tiny", "paper_column", "avg6", "imagenet", "real", "avg5", "vtab"),
        ),
        ({"tasks": ()}, ("tiny", "tasks", "FineTuneTask", "ProbeTask")),
        ({"tasks": LOW}, ("tiny", "tasks", "FineTuneTask", "ProbeTask")),
        ({"tasks": ("low",)}, ("tiny", "tasks", "FineTuneTask", "ProbeTask")),
        ({"tasks": (LOW, HIGH, LOW)}, ("tiny", "low")),
    ],
)
def test_check_suite_rejects_invalid_suites(fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with raises(UserError, *parts):
        check_suite(replace_fields(SUITE, **fields))


SHARED_CASES = [
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
FINE_TUNE_CASES = [
    (
        {"num_examples": (1, 2)},
        (
            "num_examples",
            "(1, 2)",
            "sweep_train_split",
            "sweep_val_split",
            "train_split",
            "test_split",
        ),
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
    (
        {"paper_column": "core_days"},
        ("paper_column", "core_days", "imagenet", "real", "avg5", "vtab"),
    ),
    ({"group": None}, ("group", "None")),
    ({"config_overrides": ()}, ("config_overrides", "()")),
    ({"extra_evals": ()}, ("extra_evals", "()")),
    ({"extra_evals": {"test": ("digits", "test")}}, ("extra_evals", "test")),
    ({"extra_evals": {"validation": ("digits", "test")}}, ("extra_evals", "validation")),
    ({"extra_evals": {"a.b": ("digits", "test")}}, ("extra_evals", "a.b")),
    ({"extra_evals": {"other": "digits"}}, ("extra_evals", "other", "digits")),
    ({"extra_evals": {"other": ("digits",)}}, ("extra_evals", "other", "('digits',)")),
    ({"image_size": -1}, ("image_size", "-1")),
    ({"image_size": 16, "resize_size": 15}, ("resize_size", "15", "image_size")),
    ({"model_overrides": ()}, ("model_overrides", "()")),
    ({"model_overrides": {"resnet": {}}}, ("model_overrides", "resnet")),
    ({"model_overrides": {"bit": {"dataset": "x"}}}, ("model_overrides", "bit", "dataset")),
    ({"model_overrides": {"bit": {"num_steps": 0}}}, ("num_steps", "0")),
]
PROBE_CASES = [
    ({"num_examples": (1, 2, 3, 4)}, ("num_examples", "(1, 2, 3, 4)", "train_split", "test_split")),
    ({"method": "svm"}, ("method", "svm", "few_shot", "linear", "knn")),
    ({"shots": ()}, ("shots", "()")),
    ({"shots": (0,)}, ("shots", "(0,)")),
    ({"shots": (5, 5)}, ("shots", "(5, 5)")),
]


@pytest.mark.parametrize(
    ("task", "fields", "parts"),
    [
        *((HIGH, *case) for case in [*SHARED_CASES, *FINE_TUNE_CASES]),
        *((PROBE, *case) for case in [*SHARED_CASES, *PROBE_CASES]),
    ],
)
def test_check_suite_rejects_invalid_tasks(
    task: tasks.Task, fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with raises(UserError, str(fields.get("name", task.name)), *parts) as caught:
        check_suite(replace_fields(SUITE, tasks=(LOW, replace_fields(task, **fields))))
    assert "\n" not in str(caught.value)


def test_for_model_applies_overrides_of_the_family_then_of_the_model() -> None:
    overrides: dict[str, Any] = {
        "mixer": {"num_steps": 7, "flip": True},
        "Mixer-B/16": {"num_steps": 8, "learning_rates": [0.5]},
    }
    task = dataclasses.replace(HIGH, model_overrides=overrides)
    suite = replace_fields(SUITE, tasks=(task, LOW, PROBE))
    check_suite(suite)
    changed, low, probe = tasks.for_model(suite, "mixer", "Mixer-B/16").tasks
    assert (low, probe) == (LOW, PROBE)
    assert changed == replace_fields(HIGH, num_steps=8, flip=True, learning_rates=(0.5,))
    (changed, *_) = tasks.for_model(suite, "mixer", "Mixer-S/16").tasks
    assert changed == replace_fields(HIGH, num_steps=7, flip=True)
    assert tasks.for_model(suite, "bit", "BiT-R50x1").tasks == SUITE.tasks
    assert tasks.from_json(json.loads(json.dumps(tasks.to_json(suite)))) == suite


def test_lists_and_ranges_become_tuples() -> None:
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
