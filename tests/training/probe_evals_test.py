"""Tests of probes during a run: what it writes, also when it is resumed, and what it refuses."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from mixer_jax import main as door
from mixer_jax.config.config import evals, validate
from mixer_jax.distributed.multihost import SharedFlags
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import ClassificationMetrics
from mixer_jax.evaluation.probes import ProbeMetrics
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.loop import TrainResult, train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.workdir import config_diff
from mixer_jax.visualization import curves
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

PROBES = {"few": "few_shot", "line": "linear", "near": "knn"}


def config_of_probes(digits_dir: str, num_steps: int = 8) -> ConfigDict:
    """The run of digits/low, probed on digits/high, whose classes it does not know."""
    config = small_config(
        digits_dir,
        dataset__name="digits/low",
        num_steps=num_steps,
        checkpoint__every_steps=4,
        **NO_REGULARIZATION,
    )
    unknown = {"dataset": "digits/high", "train_split": "train[:200]", "split": "test[:60]"}
    config.evals = evals(
        test={"every_steps": 4},
        few={"type": "few_shot", "every_steps": 4, "shots": "1, 5", "num_seeds": 2, **unknown},
        line={"type": "linear", "every_steps": 4, **unknown},
        near={"type": "knn", "every_steps": 3, **unknown},
    )
    validate(config)
    return config


def scores_of(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics that an evaluation wrote."""
    return [line for line in read_metrics(str(workdir)) if "loss" not in line]


@pytest.fixture(scope="module")
def finished(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("probed")
    return workdir, train_and_evaluate(config_of_probes(digits_dir), str(workdir))


def test_a_run_writes_the_scores_of_all_kinds(finished: tuple[Path, TrainResult]) -> None:
    lines = scores_of(finished[0])
    for key in ("test/top1", "few/1_shot", "few/5_shot", "line/linear", "near/knn"):
        steps = [line["step"] for line in lines if key in line]
        assert steps == ([3, 6, 8] if key == "near/knn" else [4, 8])
    few = [line for line in lines if "few/5_shot" in line]
    assert all(line["few/num_examples"] == 60 for line in few)
    assert all(25 < line["few/num_train"] <= 50 for line in few)
    # The features change as training goes on.
    assert len({line["few/5_shot"] for line in few}) > 1
    assert 0.2 < few[-1]["few/5_shot"] <= 1
    assert 0 <= few[-1]["few/5_shot_std"] < 0.3
    last = next(line for line in reversed(lines) if "line/linear" in line)
    assert last["line/num_train"] == 200
    assert last["line/penalty"] > 0


def test_the_scores_of_the_last_step_are_the_results(finished: tuple[Path, TrainResult]) -> None:
    workdir, result = finished
    lines = scores_of(workdir)
    for name in ("test", *PROBES):
        values = {f"{name}/{key}": value for key, value in result.scores[name].as_dict().items()}
        assert {"step": 8, **values} in lines


def test_a_resumed_run_writes_the_same(
    finished: tuple[Path, TrainResult],
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of_probes(digits_dir)
    with monkeypatch.context() as patch:
        # As if it were preempted at step 5.
        steps = itertools.count(1)
        patch.setattr(SharedFlags, "exchange", lambda self, *flags: (next(steps) == 5, False))
        assert train_and_evaluate(config, str(tmp_path)).step == 5
    assert train_and_evaluate(config, str(tmp_path)).step == 8
    assert scores_of(tmp_path) == scores_of(finished[0])
    again = train_and_evaluate(config, str(tmp_path))
    assert again.scores == finished[1].scores


def test_what_is_told_at_the_end(finished: tuple[Path, TrainResult], digits_dir: str) -> None:
    config = config_of_probes(digits_dir)
    result = finished[1]
    told = door.format_summary(result, "run", config)
    few, test = result.scores["few"], result.scores["test"]
    assert isinstance(few, ProbeMetrics)
    assert isinstance(test, ClassificationMetrics)
    shots = (f"{few.accuracies[name]:.2%}" for name in ("1_shot", "5_shot"))
    assert some_line_mentions(told, "few", "60", *shots)
    assert some_line_mentions(told, "test", f"{test.top1:.2%}", f"{test.top5:.2%}")
    assert some_line_mentions(told, "mixer_jax.evaluate", "--dataset=digits/low", "--split=test")
    probes_only = config_of_probes(digits_dir)
    with probes_only.evals.unlocked():
        del probes_only.evals.test
    assert "mixer_jax.evaluate" not in door.format_summary(finished[1], "run", probes_only)


def test_accuracies_of_probes_are_drawn() -> None:
    names = ("test/top1", "few/1_shot", "few/25_shot", "line/linear", "near/knn")
    assert all(curves._is_accuracy(name) for name in names)
    others = ("loss", "few/1_shot_std", "line/penalty", "test/top5", "near/num_train", "linear")
    assert not any(curves._is_accuracy(name) for name in others)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"type": "probe"}, ("probe", "classify", "few_shot", "linear", "knn")),
        ({"shots": ""}, ("''",)),
        ({"shots": "1,0"}, ("1,0",)),
        ({"shots": "5 10"}, ("5 10",)),
        ({"shots": "1,,5"}, ("1,,5",)),
        ({"shots": "²"}, ("²",)),
        ({"shots": "-1"}, ("-1",)),
        ({"num_seeds": 0}, ("0", "1")),
    ],
)
def test_what_the_config_refuses(
    entry: dict[str, Any], parts: tuple[str, ...], digits_dir: str
) -> None:
    config = small_config(digits_dir)
    config.evals = evals(e={"type": "few_shot"} | entry)
    (key,) = entry
    with raises(UserError, f"config.evals.e.{key}", *parts):
        validate(config)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"dataset": "digits/high", "shots": "1,200"}, ("digits/high", "train", "200")),
        ({"train_split": "trian"}, ("digits/all", "trian")),
        ({"split": "tset"}, ("digits/all", "tset")),
    ],
)
def test_what_the_data_refuse_before_training_begins(
    entry: dict[str, Any], parts: tuple[str, ...], digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(digits_dir, **NO_REGULARIZATION)
    config.evals = evals(e={"type": "few_shot"} | entry)
    with raises(UserError, *parts):
        train_and_evaluate(config, str(tmp_path))
    assert read_metrics(str(tmp_path)) == []


def test_classes_that_the_run_does_not_know(tmp_path: Path, digits_dir: str) -> None:
    for place in ("train/cat", "test/cat", "train/dog", "test/dog"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"")
    config = small_config(digits_dir, **NO_REGULARIZATION)
    config.evals = evals(e={"type": "knn", "dataset": f"folder:{tmp_path}"})
    sources = open_datasets(config)
    assert sources.evals["e"].class_names == sources.probe_train["e"].class_names == ("cat", "dog")


def test_runs_of_before_there_were_probes_go_on(digits_dir: str) -> None:
    config = small_config(digits_dir)
    saved = config.to_dict()
    for key in ("type", "train_split", "shots", "num_seeds"):
        del saved["evals"]["test"][key]
    assert config_diff(saved, config) == ([], [])
    config.evals = evals(test={"type": "linear", "every_steps": 10})
    harmless, harmful = config_diff(saved, config)
    assert each_mentions(harmless, ("evals.test.type", "classify", "linear"))
    assert harmful == []


def test_every_kind_of_probe_was_run(finished: tuple[Path, TrainResult]) -> None:
    for name, method in PROBES.items():
        scores = finished[1].scores[name]
        assert isinstance(scores, ProbeMetrics)
        assert scores.method == method
