"""Tests of whole runs in this process; those that kill processes are in end_to_end/."""

import dataclasses
import errno
import functools
import gc
import importlib
import json
import re
import shutil
import signal
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.manager import CheckpointManager, remove_unfinished_saves
from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.config.schema import EvalConfig
from mixer_jax.distributed.multihost import GracefulShutdown
from mixer_jax.errors import DiskFullError, RunError, UserError
from mixer_jax.evaluation.classification import ClassificationMetrics
from mixer_jax.training import loop as loop_module
from mixer_jax.training.bad_images import BadImageLog
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import TIMINGS, MetricsWriter, Progress, read_metrics
from mixer_jax.training.setup import (
    Experiment,
    build_experiment,
    make_evaluators,
    make_train_batches,
    throughput_metrics,
)
from mixer_jax.training.workdir import lock_workdir, read_starts
from mixer_jax.visualization.curves import draw_curves
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import assert_params_equal, tree_norm
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config


def train_losses(experiment: Experiment, count: int) -> list[float]:
    state, history = experiment.create_state(), []
    batches = make_train_batches(experiment, 0, print)
    for _ in range(count):
        state, metrics = experiment.train_step(state, next(batches), experiment.hyperparams)
        history.append(float(metrics["loss"]))
    return history


@pytest.mark.slow
def test_one_device_and_eight_have_the_same_losses(digits_dir: str) -> None:
    runs = {}
    for devices, fsdp in [(1, 1), (8, 1), (8, 8)]:
        config = small_config(
            digits_dir, batch_size=64, optimizer__learning_rate=0.02, mesh__fsdp=fsdp
        )
        experiment = build_experiment(config, open_datasets(config), jax.devices()[:devices])
        runs[devices, fsdp] = train_losses(experiment, 20)
    assert min(runs[1, 1]) < 0.95 * runs[1, 1][0]
    for history in runs.values():
        np.testing.assert_allclose(history, runs[1, 1], rtol=1e-5)


def bytes_per_device(tree: Any) -> int:
    shards = (leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree))
    return sum(shard.nbytes for shard in shards)


def test_fsdp_shards_kernels_moments_and_averages(digits_dir: str) -> None:
    config = small_config(digits_dir, mesh__fsdp=8, recipe__ema_decay=0.9)
    experiment = build_experiment(config, open_datasets(config))
    state = experiment.create_state()
    state, _ = experiment.train_step(
        state, next(make_train_batches(experiment, 0, print)), experiment.hyperparams
    )
    for tree in (state.params, state.opt_state, state.ema_params):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        kernels = sum(x.nbytes for path, x in leaves if getattr(path[-1], "key", "") == "kernel")
        rest = sum(x.nbytes for _, x in leaves) - kernels
        assert bytes_per_device(tree) == kernels // 8 + rest


def event_losses(workdir: Path) -> list[tuple[int, float]]:
    """Reads the losses of the first three steps from TensorBoard events."""
    values = event_values(workdir)
    return [(step, value) for step, tag, value in values if tag == "loss" and step <= 3]


def event_values(workdir: Path) -> list[tuple[int, str, float]]:
    """Reads step, tag and value of all TensorBoard events."""
    loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    tensor_util = importlib.import_module("tensorboard.util.tensor_util")
    (path,) = (workdir / "events").iterdir()
    return [
        (event.step, value.tag, tensor_util.make_ndarray(value.tensor).item())
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


@pytest.fixture(scope="module")
def finished(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for tests that only read it."""
    workdir = tmp_path_factory.mktemp("finished")
    config = small_config(digits_dir, recipe__ema_decay=0.9)
    result = train_and_evaluate(config, str(workdir))
    assert (result.step, result.stopped_by) == (20, None)
    assert result.scores["test"].num_examples == 360
    return workdir


def test_logs_are_complete_before_each_checkpoint(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes from a checkpoint does not write the lines before it again."""
    calls: list[str] = []
    for owner, name in (
        (MetricsWriter, "flush"),
        (BadImageLog, "flush"),
        (CheckpointManager, "save"),
    ):
        original = getattr(owner, name)

        def record(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            calls.append(type(self).__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, record)
    train_and_evaluate(small_config(digits_dir, **NO_REGULARIZATION), str(tmp_path))
    one_save = ["MetricsWriter", "BadImageLog", "CheckpointManager"]
    assert calls == 4 * one_save


def test_a_log_that_cannot_be_written_after_the_last_evaluation_ends_no_run(
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir, plotted = str(tmp_path), []
    flush = MetricsWriter.flush
    config = small_config(digits_dir, num_steps=3, **NO_REGULARIZATION)

    def fail_after_the_last_evaluation(self: MetricsWriter) -> None:
        flush(self)
        if any("test/log_likelihood" in line for line in read_metrics(workdir)):
            raise ConnectionError("503 the service is unavailable")

    def plot(workdir: str) -> bool:
        plotted.append(workdir)
        return True

    monkeypatch.setattr(MetricsWriter, "flush", fail_after_the_last_evaluation)
    result = train_and_evaluate(config, workdir, plot=plot)
    assert (result.step, result.exit_code, result.has_curves) == (3, 0, True)
    assert plotted == [workdir]
    assert some_line_mentions(capsys.readouterr().out, "503")


def test_run_writes_checkpoints_config_events_and_metrics(finished: Path) -> None:
    assert list_steps(str(finished)) == [15, 20]
    assert json.loads((finished / "config.json").read_text())["num_steps"] == 20
    overview = (finished / "parameters.txt").read_text().splitlines()
    (stem,) = [line for line in overview if "stem/kernel" in line]
    assert mentions(stem, "(4, 4, 3, 16)", "float32", "768")
    num_params = sum(x.size for x in jax.tree.leaves(load_checkpoint(str(finished)).params))
    assert mentions(overview[-1], f"{num_params}")
    (start,) = read_starts(str(finished))
    assert (start["step"], start["num_steps"], start["num_parameters"]) == (0, 20, num_params)
    assert (start["num_devices"], start["mesh"]) == (8, {"data": 8, "fsdp": 1})
    assert start["versions"]["jax"] == jax.__version__
    lines = read_metrics(str(finished))
    assert event_losses(finished) == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines[:3]
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "test/top1" in line] == [10, 20]
    steady = lines[2]
    names = ("loss", "learning_rate", "gradient_norm", "parameter_norm")
    assert steady.keys() >= {*names, "images_per_second"}
    assert "update_norm" not in steady


def test_finished_run_evaluates_its_checkpoint_again(
    finished: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_text()
    config = small_config(digits_dir, recipe__ema_decay=0.9)
    result = train_and_evaluate(config, str(finished))
    # The line before the score says that nothing is left to train.
    experiment = build_experiment(config, open_datasets(config))
    *description, status, score = capsys.readouterr().out.splitlines()
    for step in (0, 15):
        text = loop_module._describe_run(experiment, step, None, is_finished=False)
        *expected, other_status = text.splitlines()
        assert description == expected
        assert status != other_status
    assert mentions(score, "20", "test", f"{result.scores['test'].as_dict()['top1']:.2%}")
    assert (finished / "metrics.jsonl").read_text() == before
    last = read_metrics(str(finished))[-1]
    for key, value in result.scores["test"].as_dict().items():
        assert value == last[f"test/{key}"]


def test_a_finished_run_writes_the_scores_of_a_new_evaluation_once(
    digits_dir: str, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    config = small_config(digits_dir, num_steps=3, **NO_REGULARIZATION | {"tensorboard": True})
    train_and_evaluate(config, str(workdir))
    before = read_metrics(str(workdir))
    shutil.rmtree(workdir / "events")
    added = EvalConfig(dataset="digits/all", split="test[:50%]")
    config = dataclasses.replace(config, evals=dict(config.evals) | {"half": added})
    for _ in range(2):
        result = train_and_evaluate(config, str(workdir))
        scores = {f"half/{name}": x for name, x in result.scores["half"].as_dict().items()}
        assert read_metrics(str(workdir)) == [*before, {"step": 3, **scores}]
    tags = {tag for _, tag, _ in event_values(workdir)}
    assert tags == scores.keys()
    (half,) = [
        line
        for line in draw_curves(read_metrics(str(workdir))).axes[2].lines
        if line.get_label() == "half"
    ]
    assert half.get_ydata() == [100 * scores["half/top1"]]


def test_an_evaluation_that_fails_keeps_no_other_from_running(
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make_failing(experiment: Experiment) -> dict[str, Any]:
        def fail(params: Any) -> Any:
            raise OSError("damaged\nrecord 7")

        return make_evaluators(experiment) | {"bad": fail}

    monkeypatch.setattr(loop_module, "make_evaluators", make_failing)
    config = small_config(digits_dir, **NO_REGULARIZATION)
    evals = {"bad": EvalConfig(every_steps=10), **config.evals}
    config = dataclasses.replace(config, evals=evals)
    for first_step in (10, 20):
        result = train_and_evaluate(config, str(tmp_path))
        assert result.scores.keys() == {"test"}
        with raises(RunError, "bad", "OSError", "damaged record 7"):
            result.raise_failures()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        lines = printed.out.splitlines()
        failed = [line for line in lines if "damaged" in line]
        steps = range(first_step, 21, 10)
        each = [(str(step), "bad", "OSError", "damaged record 7") for step in steps]
        assert each_mentions(failed, *each)
    assert [line["step"] for line in read_metrics(str(tmp_path)) if "test/top1" in line] == [10, 20]


def test_bug_in_an_evaluation_prints_its_traceback_and_holds_no_parameters(
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held: list[weakref.ref[jax.Array]] = []

    def make_broken(experiment: Experiment) -> dict[str, Any]:
        def multiply_by_text(params: Any, text: Any = "text") -> Any:
            bias = jnp.copy(params["head"]["bias"])
            held.append(weakref.ref(bias))
            return bias @ text

        return {"test": multiply_by_text}

    monkeypatch.setattr(loop_module, "make_evaluators", make_broken)
    config = small_config(digits_dir, num_steps=3, **NO_REGULARIZATION)
    result = train_and_evaluate(config, str(tmp_path))
    assert (result.step, result.scores, len(held)) == (3, {}, 1)
    gc.collect()
    assert held[0]() is None
    with raises(RunError, "test", "TypeError"):
        result.raise_failures()
    # Function and line, which the message does not contain.
    assert mentions(capsys.readouterr().err, "Traceback", "multiply_by_text", "bias @ text")


def scripted_evaluators(values: list[float]) -> Callable[[Experiment], dict[str, Any]]:
    """Returns a replacement of `make_evaluators` whose evaluation "test" has these accuracies.

    The value of a step depends on the step only, as after a kill. The steps are those that `values`
    are evaluated at by `STOPPING`.
    """

    def make(experiment: Experiment) -> dict[str, Any]:
        real = make_evaluators(experiment)

        def evaluate(params: Any) -> Any:
            step = int(CURRENT_STEP[0])
            metrics = real["test"](params)
            assert isinstance(metrics, ClassificationMetrics)
            return metrics._replace(top1=values[step // 2 - 1])

        return real | {"test": evaluate}

    return make


CURRENT_STEP = [0]
# A run of 20 steps that is evaluated every 2 steps and otherwise saves only at the end.
STOPPING = NO_REGULARIZATION | {
    "checkpoint__every_steps": 0,
    "checkpoint__keep": 1,
    "checkpoint__best_metric": "test/top1",
    "evals__test__every_steps": 2,
}
ACCURACIES = [0.2, 0.5, 0.4, 0.5, 0.3, 0.7, 0.6, 0.8, 0.1, 0.8]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the accuracies of the evaluation "test" by `ACCURACIES`."""
    monkeypatch.setattr(loop_module, "make_evaluators", scripted_evaluators(ACCURACIES))
    evaluate = loop_module.TrainLoop.evaluate

    def record_step(self: Any, step: int, *args: Any) -> None:
        CURRENT_STEP[0] = step
        evaluate(self, step, *args)

    monkeypatch.setattr(loop_module.TrainLoop, "evaluate", record_step)


@pytest.mark.usefixtures("scripted")
def test_best_checkpoint_is_kept_next_to_the_newest(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(digits_dir, **STOPPING)
    kept = []
    save = loop_module.TrainLoop.save

    def record_kept(self: Any, step: int) -> None:
        save(self, step)
        self.checkpoints.wait()
        kept.append(list_steps(str(tmp_path)))

    monkeypatch.setattr(loop_module.TrainLoop, "save", record_kept)
    result = train_and_evaluate(config, str(tmp_path))
    assert result.best == (16, "test/top1", 0.8)
    assert (result.step, result.stopped_early, result.is_finished) == (20, False, True)
    # A checkpoint is saved before it is evaluated.
    expected = [[2], [2, 4], [4, 6], [4, 8], [4, 10], [4, 12], [12, 14], [12, 16], [16, 18]]
    assert kept == [*expected, [16, 20]]
    assert load_checkpoint(str(tmp_path), step="best").step == 16


@pytest.mark.usefixtures("scripted")
def test_last_checkpoint_is_kept_alone_if_it_is_the_best(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir, **STOPPING | {"num_steps": 16})
    assert train_and_evaluate(config, str(tmp_path)).best == (16, "test/top1", 0.8)
    assert list_steps(str(tmp_path)) == [16]


@pytest.mark.usefixtures("scripted")
def test_early_stopping_ends_the_run_as_its_last_step_does(
    digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = EvalConfig(dataset="digits/all", split="test[:50%]")

    def run(workdir: Path, patience: int, **changes: Any) -> Any:
        config = small_config(digits_dir, early_stopping_patience=patience, **STOPPING | changes)
        config = dataclasses.replace(config, evals={"final": final, **config.evals})
        return train_and_evaluate(config, str(workdir))

    workdir = tmp_path / "run"
    result = run(workdir, 3)
    assert (result.step, result.num_steps, result.exit_code) == (10, 20, 0)
    assert (result.stopped_early, result.is_finished) == (True, True)
    assert result.best == (4, "test/top1", 0.5)
    # All evaluations, also those that are due at the end only.
    assert result.scores.keys() == {"final", "test"}
    assert list_steps(str(workdir)) == [4, 10]
    line = next(x for x in capsys.readouterr().out.splitlines() if mentions(x, "stopped", "10"))
    assert mentions(line, "20", "test/top1", "3", "50.00%", "4")
    logged = read_metrics(str(workdir))

    # The same command does not train further, and logs nothing.
    again = run(workdir, 3)
    assert (again.step, again.stopped_early, again.metrics) == (10, True, result.metrics)
    assert read_metrics(str(workdir)) == logged
    out = capsys.readouterr().out
    assert some_line_mentions(out, "training is finished")
    assert some_line_mentions(out, "stopped early", "10")

    # More patience resumes, and the result is that of a run with this patience.
    result = run(workdir, 4)
    assert (result.step, result.stopped_early, result.best) == (20, False, (16, "test/top1", 0.8))
    run(tmp_path / "patient", 4)
    lines = [
        line
        for line in without_timings(workdir)
        if line["step"] != 10 or not any(key.startswith("final/") for key in line)
    ]
    assert lines == without_timings(tmp_path / "patient")
    assert list_steps(str(workdir)) == list_steps(str(tmp_path / "patient")) == [16, 20]
    for step in (16, 20):
        actual, expected = (
            load_checkpoint(str(folder), step=step).params
            for folder in (workdir, tmp_path / "patient")
        )
        assert_params_equal(actual, expected)


@pytest.mark.usefixtures("scripted")
def test_less_patience_ends_a_run_where_it_is(digits_dir: str, tmp_path: Path) -> None:
    def run(patience: int, min_delta: float = 0.0) -> Any:
        config = small_config(
            digits_dir,
            early_stopping_patience=patience,
            early_stopping_min_delta=min_delta,
            **STOPPING,
        )
        return train_and_evaluate(config, str(tmp_path))

    assert run(3).step == 10
    assert (run(1).step, run(1).stopped_early) == (10, True)
    # At step 12, 0.7 is better by 0.2 than 0.5.
    assert (run(4, min_delta=0.25).step, run(4, min_delta=0.15).step) == (12, 20)


@pytest.mark.usefixtures("scripted")
def test_a_stop_that_was_killed_before_its_evaluation_is_made_up_for(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(digits_dir, early_stopping_patience=3, **STOPPING)
    evaluate = loop_module.TrainLoop.evaluate

    def fail_at_step_10(self: Any, step: int, *args: Any) -> None:
        if step == 10:
            raise KeyboardInterrupt
        evaluate(self, step, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainLoop, "evaluate", fail_at_step_10)
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(config, str(tmp_path))
    assert list_steps(str(tmp_path)) == [4, 10]
    result = train_and_evaluate(config, str(tmp_path))
    assert (result.step, result.stopped_early, result.best) == (10, True, (4, "test/top1", 0.5))
    assert [line["step"] for line in read_metrics(str(tmp_path)) if "test/top1" in line] == [
        *range(2, 11, 2)
    ]


def test_checkpoint_has_the_metadata_to_use_it(finished: Path) -> None:
    weights = load_checkpoint(str(finished))
    info = weights.model_info
    assert weights.step == 20
    assert info.class_names == tuple(str(digit) for digit in range(10))
    assert info.image_size == (16, 16)
    assert (info.gelu, info.eval_crop, info.loss) == ("tanh", "resize", "softmax")
    assert info.config.hidden_dim == 16
    # The averaged parameters are loaded.
    raw = CheckpointManager(str(finished)).restore(20, {"ema_params": weights.params})["ema_params"]
    assert_params_equal(raw, weights.params)


def without_timings(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(str(workdir))
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def flip_bit(folder: Path, pattern: str) -> Path:
    path = sorted(path for path in folder.glob(pattern) if path.is_file())[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_run_resumes_from_the_newest_checkpoint_that_is_not_damaged(
    finished: Path, digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "15", checkpoints / "10")
    shutil.copytree(checkpoints / "15", checkpoints / "17")
    damaged = flip_bit(checkpoints / "20", "optimizer/ocdbt.process_0/d/*")
    (checkpoints / "17" / "params" / "manifest.ocdbt").unlink()
    config = small_config(digits_dir, recipe__ema_decay=0.9)
    result = train_and_evaluate(config, str(workdir))
    out = capsys.readouterr().out.splitlines()
    assert any(mentions(line, str(checkpoints / "20"), damaged.name) for line in out)
    assert any(mentions(line, str(checkpoints / "17"), "manifest.ocdbt") for line in out)
    assert any(mentions(line, "resuming", "15") for line in out)
    assert result.step == 20
    assert list_steps(str(workdir)) == [15, 20]
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == ["17", "20"]
    # The steps are taken again, with the same result.
    assert without_timings(workdir) == without_timings(finished)
    again = load_checkpoint(str(workdir)).params
    assert_params_equal(load_checkpoint(str(finished)).params, again)


def test_run_without_a_valid_checkpoint_is_refused(
    finished: Path, digits_dir: str, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in (15, 20):
        flip_bit(workdir / "checkpoints" / f"{step}", "params/ocdbt.process_0/d/*")
    with raises(UserError, f"{workdir}/checkpoints/15", f"{workdir}/checkpoints/20"):
        train_and_evaluate(small_config(digits_dir, recipe__ema_decay=0.9), str(workdir))
    assert list_steps(str(workdir)) == [15, 20]


@pytest.mark.slow
def test_run_repeats_bit_identically_with_the_same_seed_only(
    finished: Path, digits_dir: str, tmp_path: Path
) -> None:
    for seed in (0, 1):
        config = small_config(digits_dir, recipe__ema_decay=0.9, seed=seed)
        train_and_evaluate(config, str(tmp_path / str(seed)))
    assert without_timings(tmp_path / "0") == without_timings(finished)
    assert without_timings(tmp_path / "1") != without_timings(finished)


def test_restore_rejects_other_data(finished: Path, digits_dir: str) -> None:
    config = small_config(digits_dir, recipe__ema_decay=0.9)
    experiment = build_experiment(config, open_datasets(config))
    init = find_init_source(config, str(finished))
    checkpoints = CheckpointManager(str(finished))
    for key, value in [("num_train_examples", 1436), ("num_steps", 21)]:
        other = experiment._replace(metadata=experiment.metadata | {key: value})
        was = str(experiment.metadata[key])
        with raises(UserError, "20", key, was, str(value), "--workdir"):
            restore_or_init(other, checkpoints, init)
    named = dataclasses.replace(experiment.model_info, class_names=("a",) * 10)
    with raises(UserError, "20", "class_names", "--workdir"):
        restore_or_init(experiment._replace(model_info=named), checkpoints, init)


def test_run_logs_the_last_step_whatever_the_interval(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir, num_steps=5, log_every_steps=3, **NO_REGULARIZATION)
    train_and_evaluate(config, str(tmp_path))
    lines = read_metrics(str(tmp_path))
    assert [line["step"] for line in lines if "loss" in line] == [3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 8])
def test_logged_norms_are_those_of_their_step(fsdp: int, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(
        digits_dir,
        num_steps=3,
        log_every_steps=3,
        log_update_norm=True,
        checkpoint__every_steps=1,
        checkpoint__keep=3,
        mesh__fsdp=fsdp,
        **NO_REGULARIZATION,
    )
    train_and_evaluate(config, str(tmp_path))
    [line] = [line for line in read_metrics(str(tmp_path)) if "loss" in line]
    before, after = (load_checkpoint(f"{tmp_path}/checkpoints/{n}").params for n in (2, 3))

    update = jax.tree.map(np.subtract, after, before)
    assert line["update_norm"] == pytest.approx(tree_norm(update), rel=1e-5)
    assert line["parameter_norm"] == pytest.approx(tree_norm(after), rel=1e-5)


def test_run_does_not_save_parameters_that_are_not_finite(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_infinite(*args: Any, **kwargs: Any) -> Experiment:
        return build_experiment(*args, **kwargs)._replace(
            param_norm=lambda params: jnp.asarray(jnp.inf)
        )

    monkeypatch.setattr(loop_module, "build_experiment", build_infinite)
    config = small_config(
        digits_dir, log_every_steps=100, checkpoint__every_steps=1, **NO_REGULARIZATION
    )
    with raises(RunError, "parameter_norm", "inf", "1"):
        train_and_evaluate(config, str(tmp_path))
    assert not list_steps(str(tmp_path))


def test_full_device_memory_ends_the_run_and_names_what_needs_less(
    digits_dir: str, tmp_path: Path
) -> None:
    sizes = {"model__hidden_dim": 2**20, "model__channels_mlp_dim": 2**20}
    config = small_config(digits_dir, **{**NO_REGULARIZATION, **sizes})
    with raises(RunError, "memory", "grad_accum_steps", "remat", "fsdp", "checkpoint: none"):
        train_and_evaluate(config, str(tmp_path))


def test_full_device_memory_in_an_evaluation_names_its_batch_size(
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make_large(experiment: Experiment) -> dict[str, Any]:
        return {"test": lambda params: float(jnp.zeros(1 << 46).sum())}

    monkeypatch.setattr(loop_module, "make_evaluators", make_large)
    config = small_config(digits_dir, num_steps=3, **NO_REGULARIZATION)
    result = train_and_evaluate(config, str(tmp_path))
    with raises(RunError, "test", "memory", "eval_batch_size"):
        result.raise_failures()
    assert "Traceback" not in capsys.readouterr().err
    # Several hosts end, because not all of them may have failed.
    evaluate = loop_module.TrainLoop.evaluate

    def evaluate_on_two_hosts(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            evaluate(*args)

    monkeypatch.setattr(loop_module.TrainLoop, "evaluate", evaluate_on_two_hosts)
    with raises(RunError, "memory", "eval_batch_size") as caught:
        train_and_evaluate(config, str(tmp_path))
    assert not mentions(str(caught.value), "grad_accum_steps")


def test_diverged_run_stops_and_names_the_last_good_checkpoint(
    digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(
        digits_dir,
        optimizer__name="sgd",
        optimizer__learning_rate=1e30,
        optimizer__clip_norm=0.0,
        optimizer__warmup_steps=10,
        checkpoint__every_steps=1,
        **NO_REGULARIZATION,
    )
    with raises(RunError) as caught:
        train_and_evaluate(config, str(tmp_path))
    message = str(caught.value)
    assert re.search(r"\b(loss|\w+_norm)\b.*\b(nan|inf)\b.*\bstep\W*\d+\b", message)
    kept = list_steps(str(tmp_path))
    assert kept
    assert mentions(message, str(kept[-1]))
    loaded = load_checkpoint(str(tmp_path))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_the_run(
    number: signal.Signals, digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class SignalAtOnce(GracefulShutdown):
        """Raises the signal as soon as it is handled."""

        def __enter__(self) -> GracefulShutdown:
            entered = super().__enter__()
            signal.raise_signal(number)
            return entered

    config = small_config(digits_dir, checkpoint__every_steps=0, **NO_REGULARIZATION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.multihost, "GracefulShutdown", SignalAtOnce)
        result = train_and_evaluate(config, str(tmp_path))
    assert (result.step, result.stopped_by, result.scores) == (1, number, {})
    assert mentions(capsys.readouterr().out, number.name, "step 1")
    assert list_steps(str(tmp_path)) == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt_at(stop_step: int, patch: pytest.MonkeyPatch) -> None:
    """Makes this process receive SIGTERM while it takes a step."""
    take_step = loop_module.TrainLoop.take_step

    def take_step_and_signal(self: Any, step: int, batch: Any) -> None:
        take_step(self, step, batch)
        if step == stop_step:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(loop_module.TrainLoop, "take_step", take_step_and_signal)


# At the last step, nothing resumes, and the evaluation of the run is expected.
@pytest.mark.parametrize("stop_step", [10, 20])
def test_interrupted_run_saves_before_it_evaluates(
    stop_step: int, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation that was due is run when the run resumes, and nothing else is different."""
    events: list[str] = []
    save = CheckpointManager.save

    def record_save(self: CheckpointManager, step: int, *args: Any, **kwargs: Any) -> None:
        save(self, step, *args, **kwargs)
        events.append(f"save {step}")

    def make_recording(experiment: Experiment) -> dict[str, Any]:
        def record_eval(params: Any, original: Any) -> Any:
            events.append("evaluate")
            return original(params)

        evaluators = make_evaluators(experiment).items()
        return {name: functools.partial(record_eval, original=fn) for name, fn in evaluators}

    config = small_config(digits_dir, checkpoint__every_steps=0, **NO_REGULARIZATION)
    monkeypatch.setattr(CheckpointManager, "save", record_save)
    monkeypatch.setattr(loop_module, "make_evaluators", make_recording)
    train_and_evaluate(config, str(tmp_path / "undisturbed"))
    assert events == ["evaluate", "save 20", "evaluate"]
    events.clear()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(stop_step, patch)
        result = train_and_evaluate(config, str(tmp_path / "run"))
    assert (result.step, result.stopped_by) == (stop_step, signal.SIGTERM)
    if stop_step == 10:
        assert (events, result.scores) == (["save 10"], {})
        events.clear()
        train_and_evaluate(config, str(tmp_path / "run"))
    assert events == ["evaluate", "save 20", "evaluate"]
    assert without_timings(tmp_path / "run") == without_timings(tmp_path / "undisturbed")


def test_a_run_that_is_ahead_of_its_devices_resumes_bit_identically(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps that are short enough to be four steps ahead.
    monkeypatch.setattr(Progress, "lap", lambda self, step: 1e6)
    ahead = []
    save = loop_module.TrainLoop.save

    def record_ahead(self: Any, step: int) -> None:
        ahead.append((self.logger._max_ahead, len(self.logger._pending), step))
        save(self, step)

    monkeypatch.setattr(loop_module.TrainLoop, "save", record_ahead)
    changes: dict[str, Any] = {
        "num_steps": 45,
        "checkpoint__every_steps": 0,
        "evals__test__every_steps": 0,
    }
    config = small_config(digits_dir, log_every_steps=20, **changes, **NO_REGULARIZATION)
    train_and_evaluate(config, str(tmp_path / "undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(33, patch)
        train_and_evaluate(config, str(tmp_path / "run"))
    train_and_evaluate(config, str(tmp_path / "run"))
    assert ahead == [(4, 0, 45), (4, 0, 33), (4, 0, 45)]
    assert without_timings(tmp_path / "run") == without_timings(tmp_path / "undisturbed")


def test_resumed_run_repeats_no_evaluation(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(digits_dir, **NO_REGULARIZATION)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(11, patch)
        train_and_evaluate(config, str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "11")
    calls: list[int] = []

    def make_recording(experiment: Experiment) -> dict[str, Any]:
        def record_eval(params: Any) -> Any:
            calls.append(1)
            return original(params)

        original = make_evaluators(experiment)["test"]
        return {"test": record_eval}

    monkeypatch.setattr(loop_module, "make_evaluators", make_recording)
    # Resumes from step 10, which has been evaluated.
    assert train_and_evaluate(config, str(tmp_path)).step == 20
    assert len(calls) == 1
    assert [line["step"] for line in read_metrics(str(tmp_path)) if "test/top1" in line] == [10, 20]


def is_locked(workdir: Path) -> bool:
    """Returns whether other threads and processes cannot lock a workdir."""

    def is_refused() -> bool:
        try:
            with lock_workdir(str(workdir)):
                return False
        except RunError:
            return True

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(is_refused).result()


@pytest.mark.parametrize(
    ("filename", "named"),
    [
        (None, "workdir '{workdir}'"),
        ("{workdir}/checkpoints/5", "workdir '{workdir}'"),
        ("{workdir}_scratch/spill", "'{workdir}_scratch/spill'"),
    ],
)
def test_full_disk_names_the_full_one_and_frees_space_in_a_locked_workdir(
    filename: str | None,
    named: str,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir = tmp_path / "run"
    unfinished = workdir / "checkpoints" / "10.orbax-checkpoint-tmp"
    save = CheckpointManager.save
    locked: list[bool] = []

    def fill_disk(self: CheckpointManager, step: int, *args: Any, **kwargs: Any) -> None:
        if step == 5:
            return save(self, step, *args, **kwargs)
        unfinished.mkdir()
        path = filename and filename.format(workdir=workdir)
        raise OSError(errno.ENOSPC, "No space left on device", path)

    def remove(path: str) -> None:
        locked.append(is_locked(workdir))
        remove_unfinished_saves(path)

    monkeypatch.setattr(CheckpointManager, "save", fill_disk)
    monkeypatch.setattr(loop_module, "remove_unfinished_saves", remove)
    with raises(DiskFullError, "No space left on device", f"{workdir}/checkpoints/5") as caught:
        train_and_evaluate(small_config(digits_dir, **NO_REGULARIZATION), str(workdir))
    assert str(caught.value).startswith(f"{named.format(workdir=workdir)} cannot be written")
    assert locked == [True]
    assert not unfinished.exists()
    assert not is_locked(workdir)


def test_run_saves_checkpoints_by_time(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(
        digits_dir,
        num_steps=4,
        checkpoint__every_steps=0,
        checkpoint__every_minutes=1e-9,
        checkpoint__keep=10,
        **NO_REGULARIZATION,
    )
    train_and_evaluate(config, str(tmp_path))
    assert list_steps(str(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"batch_size": 12}, ("config.batch_size", "12", "8", "16")),
        ({"recipe__grad_accum_steps": 4}, ("config.batch_size", "16", "8", "4", "32")),
        ({"mesh__fsdp": 3}, ("mesh.fsdp", "3", "8")),
        ({"mesh__data": 2, "mesh__fsdp": 2}, ("mesh.data", "mesh.fsdp", "2", "8")),
        ({"dataset__train_split": "trian"}, ("digits/all", "trian", "train", "test")),
        (
            {"dataset__name": "digits/low", "evals__test__dataset": "digits/high"},
            ("config.evals.test", "digits/high", *"0123456789"),
        ),
        ({"num_steps": 0, "num_epochs": 0.01}, ("warmup_steps", "2", "1")),
    ],
)
def test_run_rejects_what_data_and_devices_rule_out(
    digits_dir: str, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config = small_config(digits_dir, **changes)
    with raises(UserError, *parts):
        train_and_evaluate(config, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_throughput_metrics_have_mfu_if_the_peak_is_known(
    digits_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(digits_dir)
    experiment = build_experiment(config, open_datasets(config))
    assert "model_flops_utilization" not in throughput_metrics(experiment, 1000.0)
    monkeypatch.setattr("mixer_jax.training.setup.peak_flops", lambda kind: 1e9)
    metrics = throughput_metrics(experiment, 1000.0)
    assert metrics["images_per_second_per_device"] == 125.0
    # 16 tokens of 16 channels, two blocks of (8, 16) hidden units, ten classes.
    macs = 16 * 48 * 16 + 2 * (2 * 16 * 8 * 16 + 2 * 16 * 16 * 16) + 16 * 10
    assert metrics["model_flops_utilization"] == pytest.approx(3 * 2 * macs * 125 / 1e9)
