"""Tests of the output of `main` and `evaluate`, and of their usage errors."""

import json
from pathlib import Path

import pytest

from mixer_jax.training.metrics import read_metrics
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, start
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("finished")
    finish(start(digits_dir, workdir, **NO_REGULARIZATION, num_steps=20))
    return workdir


def test_evaluate_prints_a_table_or_json(finished: Path, digits_dir: str) -> None:
    arguments = [f"--checkpoint={finished}", "--dataset=digits", f"--data_dir={digits_dir}"]
    table = run_cli("evaluate", *arguments, "--split=test")
    assert table.stderr == ""
    result = run_cli("evaluate", *arguments, "--split=test", "--json", "--batch_size=50")
    metrics = json.loads(result.stdout)
    assert metrics["num_examples"] == 360
    top1 = f"{metrics['top1']:.2%}"
    assert any(mentions(line, "top-1", top1) for line in table.stdout.splitlines())
    # The last evaluation of the run had the same result, with another batch size.
    last = read_metrics(str(finished))[-1]
    assert metrics["top1"] == last["test/top1"]
    assert metrics["log_likelihood"] == pytest.approx(last["test/log_likelihood"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--checkpoint"]),
        (["--checkpoint=/nowhere"], ["/nowhere"]),
        (["--checkpoint=RUN", "--step=7"], ["7", "10", "20"]),
        (["--checkpoint=RUN", "--split=tset"], ["tset", "digits"]),
        (["--checkpoint=RUN", "--dataset=folder:/nowhere"], ["/nowhere"]),
        (["--checkpoint=RUN", "--batch_size=0"], ["--batch_size", "0"]),
    ],
)
def test_evaluate_reports_usage_errors(
    finished: Path, digits_dir: str, arguments: list[str], parts: list[str]
) -> None:
    arguments = [argument.replace("RUN", str(finished)) for argument in arguments]
    result = run_cli("evaluate", *arguments, f"--data_dir={digits_dir}", code=2)
    assert result.stdout == ""
    # The path may contain the numbers.
    assert mentions(result.stderr.replace(str(finished), ""), *parts)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config"]),
        (["--config=configs/digits.py", "--config.init_from=/nowhere"], ["/nowhere"]),
        (["--config=configs/digit.py"], ["configs/digit.py", "configs/digits.py"]),
        (["--config=README.md"], ["README.md"]),
        (["--config=configs/digits.py:medium"], ["medium", "low", "high"]),
        (["--config=configs/digits.py", "--confg.seed=1"], ["--confg.seed"]),
        (["--config=configs/digits.py", "--config.seed"], ["--config.seed"]),
        (["--config=configs/digits.py", "--config.sed=1"], ["sed", "seed"]),
        (["--config=configs/digits.py", "--config.seed=x"], ["seed", "x"]),
        (
            ["--config=configs/digits.py", "--config.model.variant=Z/9"],
            ["variant", "Z/9", "S/32", "B/16"],
        ),
        (["--config=configs/digits.py", "--config.num_steps=50"], ["warmup_steps", "100", "50"]),
        (["--config=configs/digits.py", "--workdir=/proc/x"], ["/proc/x"]),
        (
            ["--config=configs/digits.py", "--config.batch_size=100", "--config.mesh.fsdp=3"],
            ["mesh"],
        ),
    ],
)
def test_main_reports_usage_errors_in_one_line(
    arguments: list[str], parts: list[str], digits_dir: str, tmp_path: Path
) -> None:
    if arguments[:1] == ["--config=configs/digits.py"]:
        arguments = [arguments[0], f"--config.dataset.data_dir={digits_dir}", *arguments[1:]]
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path}/run"]
    result = run_cli("main", *arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert mentions(line, *parts)
    assert not (tmp_path / "run").exists()


def test_main_rejects_the_workdir_of_another_experiment(finished: Path, digits_dir: str) -> None:
    before = (finished / "config.json").read_text()
    process = start(
        digits_dir, finished, **NO_REGULARIZATION, num_steps=20, optimizer__learning_rate=0.5
    )
    _, err = process.communicate()
    assert process.returncode == 2
    assert mentions(err, "learning_rate", "0.003", "0.5")
    assert (finished / "config.json").read_text() == before


def test_main_prints_how_to_prepare_missing_data(tmp_path: Path) -> None:
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    result = run_cli(
        "main",
        "--config=configs/mixer_l16_i21k.py",
        f"--workdir={workdir}",
        f"--config.dataset.data_dir={data_dir}",
        code=2,
    )
    (line,) = result.stderr.strip().splitlines()
    assert mentions(line, "imagenet21k", str(data_dir))
    assert mentions(line, "python -m mixer_jax.prepare imagenet21k")
    assert mentions(line, "--config.dataset.name=synthetic")
    assert not workdir.exists()


def test_main_help_lists_config_keys_with_defaults() -> None:
    lines = run_cli("main", "--help").stdout.splitlines()
    for key, default in (
        ("optimizer.learning_rate", "0.001"),
        ("mesh.fsdp", "1"),
        ("evals.NAME.split", "test"),
    ):
        assert any(line.split()[:2] == [key, default] for line in lines), key
