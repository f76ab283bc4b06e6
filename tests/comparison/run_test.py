"""Tests of comparisons of tiny models, in this process."""

import json
import shutil
import time
from pathlib import Path

import pytest

from mixer_jax import compare
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.comparison import run
from mixer_jax.errors import UserError
from mixer_jax.suites.workdir import Throughput
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_comparison import read_rows, run_compare, write_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def clock_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces measurements of throughput, which take seconds, by the clock."""

    def measure(weights: PretrainedWeights) -> Throughput:
        return Throughput(time.monotonic(), 8, "cpu", weights.model_info.image_size)

    monkeypatch.setattr(run, "measure_throughput", measure)


@pytest.mark.usefixtures("clock_rates")
def test_trained_models_are_compared_and_kept(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    arguments = [f"a={config}", f"b={config}:16"]
    workdir = tmp_path / "first"
    text = run_compare(capsys, workdir, *arguments)
    assert mentions(text, "a, b on synthetic test", "images/s")
    assert not list(workdir.rglob("checkpoints"))
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")
    # Again: the same to the digit, measured times as well. Another table, too, without training.
    before = (workdir / "results.json").read_text()
    assert run_compare(capsys, workdir, *arguments) == text
    assert (workdir / "results.json").read_text() == before
    as_json = run_compare(capsys, workdir, *arguments, "--format=json")
    assert as_json == before

    for changed in (
        [*arguments, "--config.optimizer.learning_rate=0.5"],
        [arguments[0], f"b={config}:24", *arguments[2:]],
        [*arguments, "--config.evals.test.split=train"],
    ):
        with pytest.raises(UserError, match="Choose another --workdir"):
            run_compare(capsys, workdir, *changed)


@pytest.mark.slow
def test_another_folder_gives_the_same_results(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    arguments = [f"a={config}", f"b={config}:16", "--seeds=0,1", "--equal_flops"]
    arguments += ["--no_throughput"]
    workdir = tmp_path / "first"
    assert mentions(run_compare(capsys, workdir, *arguments), "equal FLOPs")
    a, b = read_rows(workdir)
    assert a["num_steps"] == 4
    assert b["num_steps"] < 4
    assert len(a["top1"]) == len(b["top1"]) == 2
    assert a["seeds"] == b["seeds"] == [0, 1]
    other = tmp_path / "second"
    run_compare(capsys, other, *arguments)
    assert read_rows(other) == [a, b]

    # A run that is not complete is trained again; the others are not.
    kept = (workdir / "a" / "seed=0" / "result.json").stat().st_mtime_ns
    shutil.rmtree(workdir / "b" / "seed=1")
    run_compare(capsys, workdir, *arguments)
    assert read_rows(workdir) == [a, b]
    assert (workdir / "a" / "seed=0" / "result.json").stat().st_mtime_ns == kept


def test_dry_run_trains_nothing(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    text = run_compare(capsys, tmp_path / "new", f"a={config}", "--dry_run", "--seeds=3,4")
    assert mentions(text, "seed 3: 4 steps of 8 of 32 images", "TFLOPs", "2 runs, 0 completed")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_workdirs_are_evaluated(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    workdir = tmp_path / "trained"
    run_compare(capsys, workdir, f"a={config}", "--keep_checkpoints", "--no_throughput")
    (trained,) = read_rows(workdir)
    trained_run = workdir / "a" / "seed=0"
    evaluated = tmp_path / "evaluated"
    arguments = [f"a={trained_run}", "Mixer-S/32", "--no_throughput"]
    with pytest.raises(UserError):
        # Tokens of this model cannot be resized by half.
        run_compare(capsys, evaluated, f"a={trained_run}", "--image_size=15", "--no_throughput")
    text = run_compare(capsys, evaluated, *arguments)
    row, untrained = read_rows(evaluated)
    for name in ("top1", "num_params", "forward_flops", "train_flops", "num_steps", "num_examples"):
        assert row[name] == trained[name], name
    assert untrained["top1"] == []
    assert untrained["num_params"] == 19_104_624
    assert mentions(text, "From the paper", "11,489")
    # Evaluated at another size, it has more FLOPs per image; its training cost is the same.
    larger = tmp_path / "larger"
    run_compare(capsys, larger, f"a={trained_run}", "--image_size=32", "--no_throughput")
    (resized,) = read_rows(larger)
    assert resized["forward_flops"] > 2 * trained["forward_flops"]
    assert resized["train_flops"] == trained["train_flops"]
    # Together with the config that it was trained from.
    both = tmp_path / "both"
    run_compare(capsys, both, f"b={config}", f"a={trained_run}", "--no_throughput")
    first, second = read_rows(both)
    assert first["top1"] == second["top1"] == trained["top1"]


@pytest.mark.slow
def test_results_of_a_changed_checkpoint_are_refused(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    for seed in (0, 1):
        flags = ["--keep_checkpoints", "--no_throughput", f"--seeds={seed}"]
        run_compare(capsys, tmp_path / "trained", f"a={config}", *flags)
    weights = tmp_path / "weights"
    shutil.copytree(tmp_path / "trained" / "a" / "seed=0", weights)
    arguments = [str(weights), "--no_throughput"]
    run_compare(capsys, tmp_path / "evaluated", *arguments)
    shutil.rmtree(weights)
    shutil.copytree(tmp_path / "trained" / "a" / "seed=1", weights)
    with pytest.raises(UserError, match="has changed since"):
        run_compare(capsys, tmp_path / "evaluated", *arguments)


def test_a_varied_key_gives_rows(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path)
    flags = ["--vary=dataset.num_examples=16,32", "--no_throughput"]
    text = run_compare(capsys, tmp_path / "out", f"a={config}", *flags)
    assert mentions(text, "num_examples", "training images")
    rows = read_rows(tmp_path / "out")
    assert [(row["value"], row["num_train"]) for row in rows] == [("16", 16), ("32", 32)]


@pytest.mark.slow
def test_a_diverging_model_does_not_stop_the_others(tmp_path: Path, capsys: Capture) -> None:
    good = write_config(tmp_path)
    source = good.read_text().replace(
        "config.compilation_cache",
        "config.optimizer.learning_rate = 1e38; config.compilation_cache",
    )
    source = source.replace("optimizer.warmup_steps = 2", "optimizer.warmup_steps = 0")
    bad = write_config(tmp_path, "bad.py", source)
    arguments = [f"bad={bad}", f"good={good}", "--no_throughput"]
    text = run_compare(capsys, tmp_path / "out", *arguments, code=1)
    assert mentions(text, "bad failed", "finite")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["mean"] is None for row in rows] == [True, False]
    assert [row["seeds"] for row in rows] == [[], [0]]


def test_multi_label_models_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    weights = random_weights(class_names=("cat", "dog"), loss="sigmoid", multi_label=True)
    source = save_run(weights, tmp_path / "several")
    with raises(UserError, "several", "multi-label"):
        compare.main([source, "--dataset=digits", "--split=test", f"--workdir={tmp_path}/table"])
