"""Tests of evaluations during a run, above all of probes: metrics, resuming and errors."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import config as config_lib
from mixer_jax import main
from mixer_jax.config.schema import EvalConfig, RunConfig
from mixer_jax.distributed.multihost import SharedFlags
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import ClassificationMetrics
from mixer_jax.evaluation.probes import ProbeMetrics
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.loop import TrainResult, train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.workdir import config_diff
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

PROBES = {"few": "few_shot", "line": "linear", "near": "knn"}


def probe_config(digits_dir: str, num_steps: int = 8) -> RunConfig:
    """Creates a run on digits/low with probes on digits/high, which has other classes."""
    config = small_config(
        digits_dir,
        dataset__name="digits/low",
        num_steps=num_steps,
        checkpoint__every_steps=4,
        **NO_REGULARIZATION,
    )
    other = EvalConfig("knn", "digits/high", "test[:60]", "train[:200]", every_steps=3)
    few = dataclasses.replace(other, type="few_shot", shots="1, 5", num_seeds=2, every_steps=4)
    line = dataclasses.replace(other, type="linear", every_steps=4)
    evals = {"test": EvalConfig(every_steps=4), "few": few, "line": line, "near": other}
    return dataclasses.replace(config, evals=evals)


def eval_lines(workdir: Path) -> list[dict[str, Any]]:
    """Reads the metrics that evaluations wrote."""
    return [line for line in read_metrics(str(workdir)) if "loss" not in line]


@pytest.fixture(scope="module")
def finished(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    workdir = tmp_path_factory.mktemp("probed")
    return workdir, train_and_evaluate(probe_config(digits_dir), str(workdir))


def test_run_writes_the_metrics_of_all_evaluation_types(finished: tuple[Path, TrainResult]) -> None:
    lines = eval_lines(finished[0])
    for key in ("test/top1", "few/1_shot", "few/5_shot", "line/linear", "near/knn"):
        steps = [line["step"] for line in lines if key in line]
        assert steps == ([3, 6, 8] if key == "near/knn" else [4, 8])
    few = [line for line in lines if "few/5_shot" in line]
    assert all(line["few/num_examples"] == 60 for line in few)
    assert all(25 < line["few/num_train"] <= 50 for line in few)
    # Training changes the features.
    assert len({line["few/5_shot"] for line in few}) > 1
    assert 0.2 < few[-1]["few/5_shot"] <= 1
    assert 0 <= few[-1]["few/5_shot_std"] < 0.3
    last = next(line for line in reversed(lines) if "line/linear" in line)
    assert last["line/num_train"] == 200
    assert last["line/penalty"] > 0


def test_result_has_the_metrics_of_the_last_step(finished: tuple[Path, TrainResult]) -> None:
    workdir, result = finished
    lines = eval_lines(workdir)
    for name in ("test", *PROBES):
        values = {f"{name}/{key}": value for key, value in result.scores[name].as_dict().items()}
        assert {"step": 8, **values} in lines


@pytest.mark.slow
def test_resumed_run_writes_the_same_metrics(
    finished: tuple[Path, TrainResult],
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = probe_config(digits_dir)
    with monkeypatch.context() as patch:
        # As if the run were preempted at step 5.
        steps = itertools.count(1)
        patch.setattr(SharedFlags, "exchange", lambda self, *flags: (next(steps) == 5, False))
        assert train_and_evaluate(config, str(tmp_path)).step == 5
    assert train_and_evaluate(config, str(tmp_path)).step == 8
    assert eval_lines(tmp_path) == eval_lines(finished[0])
    again = train_and_evaluate(config, str(tmp_path))
    assert again.scores == finished[1].scores


def test_format_summary_has_the_metrics_of_all_evaluations(
    finished: tuple[Path, TrainResult], digits_dir: str
) -> None:
    config = probe_config(digits_dir)
    result = finished[1]
    text = main.format_summary(result, "run", config)
    few, test = result.scores["few"], result.scores["test"]
    assert isinstance(few, ProbeMetrics)
    assert isinstance(test, ClassificationMetrics)
    shots = (f"{few.accuracies[name]:.2%}" for name in ("1_shot", "5_shot"))
    assert some_line_mentions(text, "few", "60", *shots)
    assert some_line_mentions(text, "test", f"{test.top1:.2%}", f"{test.top5:.2%}")
    assert some_line_mentions(text, "mixer_jax.evaluate", "--dataset=digits/low", "--split=test")
    assert "curves.png" not in text
    drawn = result._replace(has_curves=True)
    assert mentions(main.format_summary(drawn, "run", config), "run/curves.png")
    probes = {name: entry for name, entry in config.evals.items() if name != "test"}
    probes_only = dataclasses.replace(config, evals=probes)
    assert "mixer_jax.evaluate" not in main.format_summary(result, "run", probes_only)


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
def test_parse_rejects_invalid_evals(entry: dict[str, Any], parts: tuple[str, ...]) -> None:
    config = config_lib.get_default()
    config.num_steps = 20_000
    config.evals = config_lib.evals(e={"type": "few_shot"} | entry)
    (key,) = entry
    with raises(UserError, f"config.evals.e.{key}", *parts):
        config_lib.parse(config)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"dataset": "digits/high", "shots": "1,200"}, ("digits/high", "train", "200")),
        ({"train_split": "trian"}, ("digits/all", "trian")),
        ({"split": "tset"}, ("digits/all", "tset")),
    ],
)
def test_run_rejects_evals_that_do_not_fit_the_data(
    entry: dict[str, Any], parts: tuple[str, ...], digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(digits_dir, **NO_REGULARIZATION)
    evals = {"e": EvalConfig(**{"type": "few_shot"} | entry)}
    config = dataclasses.replace(config, evals=evals)
    with raises(UserError, *parts):
        train_and_evaluate(config, str(tmp_path))
    assert read_metrics(str(tmp_path)) == []


def test_probe_datasets_may_have_other_classes(tmp_path: Path, digits_dir: str) -> None:
    for path in ("train/cat", "test/cat", "train/dog", "test/dog"):
        folder = tmp_path / path
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"")
    config = small_config(digits_dir, **NO_REGULARIZATION)
    config = dataclasses.replace(config, evals={"e": EvalConfig("knn", f"folder:{tmp_path}")})
    datasets = open_datasets(config)
    assert datasets.evals["e"].class_names == ("cat", "dog")
    assert datasets.probe_train["e"].class_names == ("cat", "dog")


def test_config_diff_accepts_runs_from_before_probes(digits_dir: str) -> None:
    config = small_config(digits_dir)
    saved = config.to_dict()
    for key in ("type", "train_split", "shots", "num_seeds"):
        del saved["evals"]["test"][key]
    assert config_diff(saved, config) == ([], [])
    probe = dataclasses.replace(config.evals["test"], type="linear")
    resumable, incompatible = config_diff(saved, dataclasses.replace(config, evals={"test": probe}))
    assert each_mentions(resumable, ("evals.test.type", "classify", "linear"))
    assert incompatible == []


def test_result_has_the_method_of_every_probe(finished: tuple[Path, TrainResult]) -> None:
    for name, method in PROBES.items():
        scores = finished[1].scores[name]
        assert isinstance(scores, ProbeMetrics)
        assert scores.method == method
