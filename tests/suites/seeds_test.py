"""Tests of runs of one config with several seeds: results, skipping, resuming, and the table."""

import dataclasses
import json
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import main
from mixer_jax.checkpoints.best import BestCheckpoint
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.suites import seeds as seeds_module
from mixer_jax.suites.seeds import SeedResult, format_table, read_result, run_seeds, to_json
from mixer_jax.training import loop as loop_module
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.workdir import check_workdir
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config, to_flags

TINY = NO_REGULARIZATION | {
    "num_steps": 4,
    "checkpoint__every_steps": 0,
    "checkpoint__best_metric": "test/log_likelihood",
    "evals__test__every_steps": 2,
}


@pytest.fixture(scope="module")
def config(digits_dir: str) -> RunConfig:
    return small_config(digits_dir, **TINY)


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with the seeds 3 and 1, for tests that only read them."""
    workdir = tmp_path_factory.mktemp("seeds")
    outcome = run_seeds(config, str(workdir), (3, 1), print)
    assert [result.seed for result in outcome.results] == [1, 3]
    return workdir


def log_likelihood(workdir: Path) -> float:
    return read_metrics(str(workdir))[-1]["test/log_likelihood"]


def test_each_seed_is_an_ordinary_run(finished: Path, config: RunConfig, tmp_path: Path) -> None:
    for seed in (3, 1):
        alone = tmp_path / f"{seed}"
        result = train_and_evaluate(dataclasses.replace(config, seed=seed), str(alone))
        assert (
            log_likelihood(finished / f"seed{seed}")
            == log_likelihood(alone)
            == result.metrics["test/log_likelihood"]
        )
    data = json.loads((finished / "seeds.json").read_text())
    values = [log_likelihood(finished / f"seed{seed}") for seed in (3, 1)]
    assert values[0] != values[1]
    assert data["seeds"] == [1, 3]
    assert data["mean"]["test/log_likelihood"] == statistics.fmean(values)
    assert data["std"]["test/log_likelihood"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert data["runs"]["3"]["metrics"]["test/log_likelihood"] == values[0]
    assert data["runs"]["1"]["best"]["metric"] == "test/log_likelihood"


def test_finished_runs_are_skipped(
    finished: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(seeds_module, "train_and_evaluate", fail)
    before = (finished / "seeds.json").read_text()
    outcome = run_seeds(config, str(finished), (3, 1), print)
    assert (finished / "seeds.json").read_text() == before
    assert outcome.stopped_by is None
    # Those of earlier commands stay in the table.
    outcome = run_seeds(config, str(finished), (1,), print)
    assert [result.seed for result in outcome.results] == [1, 3]
    assert (finished / "seeds.json").read_text() == before
    # A change that affects results is evaluated again; other runs do not have it.
    evals = {"test": dataclasses.replace(config.evals["test"], split="train")}
    lines: list[str] = []
    with pytest.raises(AssertionError):
        run_seeds(dataclasses.replace(config, evals=evals), str(finished), (1,), lines.append)
    assert mentions(lines[0], f"{finished}/seed3")
    assert (finished / "seeds.json").read_text() == before


def test_a_stopped_run_is_resumed_and_the_next_ones_are_not_started(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = loop_module.multihost.SharedFlags.exchange
    with monkeypatch.context() as patched:
        calls = 0

        def stop_in_the_second_run(self: Any, *flags: bool) -> tuple[bool, ...]:
            nonlocal calls
            calls += 1
            return (True, False) if calls == 6 else exchange(self, *flags)

        patched.setattr(loop_module.multihost.SharedFlags, "exchange", stop_in_the_second_run)
        outcome = run_seeds(config, str(tmp_path), (3, 1, 2), print)
    assert ([r.seed for r in outcome.results], outcome.stopped_by) == ([3], signal.SIGTERM)
    assert not (tmp_path / "seed2").exists()
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"] == [3]
    run_seeds(config, str(tmp_path), (3, 1), print)
    assert json.loads((tmp_path / "seeds.json").read_text()) == json.loads(
        (finished / "seeds.json").read_text()
    )


def test_a_run_without_all_evaluations_is_not_finished(finished: Path, config: RunConfig) -> None:
    config = dataclasses.replace(config, seed=3)
    workdir = str(finished / "seed3")
    assert read_result(workdir, config) is not None
    more = dataclasses.replace(config, evals={**config.evals, "more": config.evals["test"]})
    assert read_result(workdir, more) is None
    assert read_result(str(finished / "seed2"), config) is None


def test_table_has_mean_and_sample_standard_deviation() -> None:
    values = {0: 0.5, 1: 0.75, 7: 1.0}
    results = [
        SeedResult(
            seed,
            10,
            {"val/top1": value, "val/log_likelihood": -value, "val/num_examples": 8.0},
            BestCheckpoint(4, "val/top1", 0.875),
        )
        for seed, value in values.items()
    ]
    table = format_table(results)
    assert some_line_mentions(table, "seed 0", "seed 1", "seed 7")
    assert some_line_mentions(table, "val/top1", "50.00%", "100.00%", "75.00% ± 25.00%")
    assert some_line_mentions(table, "val/top1, best", "87.50% ± 0.00%")
    assert some_line_mentions(table, "val/log_likelihood", "-0.7500 ± 0.2500")
    assert "num_examples" not in table
    one = format_table(results[:1])
    assert some_line_mentions(one, "val/top1", "50.00%")
    assert "±" not in one.partition("\n")[2]
    assert to_json(results[:1])["std"]["val/top1"] is None


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--seeds=0,0"], ["--seeds", "'0,0'"]),
        (["--seeds=a"], ["--seeds", "'a'"]),
        (["--seeds=4294967296"], ["--seeds", "4294967296"]),
        (["--seeds=0", "--config.seed=3"], ["--config.seed", "--seeds", "3"]),
    ],
)
def test_wrong_seeds_are_named(
    digits_dir: str, tmp_path: Path, flags: list[str], parts: list[str]
) -> None:
    command = ["--config=digits", f"--workdir={tmp_path}/runs", *to_flags(digits_dir, **TINY)]
    with raises(UserError, *parts):
        main.main([*command, *flags])
    assert not (tmp_path / "runs").exists()


def test_a_workdir_has_one_run_or_those_of_several_seeds(
    finished: Path, digits_dir: str, config: RunConfig
) -> None:
    command = ["--config=digits", f"--workdir={finished}/seed3", *to_flags(digits_dir, **TINY)]
    with raises(UserError, f"'{finished}/seed3'", "--seeds"):
        main.main([*command, "--seeds=0"])
    with raises(UserError, f"'{finished}'", "seeds.json", "--seeds"):
        check_workdir(str(finished), config)


def test_main_prints_the_table(
    finished: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = to_flags(digits_dir, **TINY)
    command = ["--config=digits", f"--workdir={finished}", *flags, "--seeds=3,1"]
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert mentions(out, "seed 3", "seed 1", "test/top1", "mean ± std", f"{finished}/seeds.json")
