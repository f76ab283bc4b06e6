"""Tests of `python -m mixer_jax.compare`: arguments, their errors, and the command as a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax import compare
from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, wait_until
from tests.helpers.tiny_comparison import read_rows, write_config


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["digts"], ["digts", "digits"]),
        (["digits", "--topology=v9:2x2"], ["--topology", "v9:2x2"]),
        (["digits", "digits"], ["twice", "LABEL=MODEL"]),
        (["digits", "fashion_mnist"], ["one dataset", "digits/all for digits", "fashion_mnist"]),
        (["digits", "--seeds=a"], ["--seeds", "'a'"]),
        (["digits", "--vary=optimizer.learningrate=1,2"], ["learning_rate"]),
        (["digits", "--format=xml"], ["--format", "xml"]),
        (["digits", "--config.seed"], ["--config.seed=VALUE"]),
        (["digits", "--dataset=digits"], ["--dataset", "left out"]),
        (["digits", "--image_size=32"], ["--image_size", "--config.image_size"]),
        (["digits", "--sedes=1"], ["--sedes", "--seeds"]),
        (["digits", "--seeds="], ["--seeds", "''"]),
        (["digits", "--vary="], ["--vary", "''"]),
        (["digits", "--topology="], ["--topology"]),
        (["Mixer-B/16", "--seeds=1"], ["--seeds", "no config"]),
        (["Mixer-B/16", "--vary=seed=1,2"], ["--vary", "no config"]),
        (["Mixer-B/16", "--topology=v3:2x2"], ["--topology", "no config"]),
        (["Mixer-B/16", "--equal_flops"], ["--equal_flops", "no config"]),
        (["Mixer-B/16", "--config.num_steps=1"], ["--config.num_steps", "no config"]),
        (["Mixer-B/16", "--dataset=digits"], ["--dataset", "none"]),
        (["a/b/none", "--dataset=digits"], ["a/b/none", "does not exist"]),
        (["runs/none", "--split=test"], ["--split", "--dataset"]),
    ],
)
def test_invalid_arguments(
    arguments: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.common, "configure_jax", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError) as error:
        compare.main(arguments)
    assert mentions(str(error.value), *parts)


def test_usage_errors_of_the_process_are_one_line() -> None:
    done = run_cli("compare", "digits", "--workdir=", code=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert mentions(line, "--workdir")


def test_workdir_is_named_after_the_models() -> None:
    models = compare.parse_models(["digits", "b=digits:low", "Mixer-B/16"])
    assert compare._default_workdir(models) == "runs/compare_digits_b_Mixer-B_16"


def start(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.compare", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_a_killed_comparison_gives_the_same_table(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = [f"a={config}", f"b={config}:16", "--no_throughput", "--format=csv"]
    arguments += ["--config.num_steps=100", "--config.checkpoint.every_steps=20"]
    arguments += ["--config.log_every_steps=20"]

    finish(start(tmp_path / "whole", *arguments))
    killed = tmp_path / "killed"
    for moment in ("a/seed=0/checkpoints", "a/seed=0/result.json", "b/seed=0/checkpoints"):
        process = start(killed, *arguments)
        wait_until(lambda moment=moment: (killed / moment).exists(), process)  # type: ignore[misc]
        process.kill()
        process.communicate()
    finish(start(killed, *arguments))
    assert read_rows(killed) == read_rows(tmp_path / "whole")


@pytest.mark.slow
def test_families_are_compared_without_arguments(digits_dir: str, tmp_path: Path) -> None:
    arguments = [f"--config.dataset.data_dir={digits_dir}", "--no_throughput"]
    process = start(tmp_path, *arguments)
    wait_until((tmp_path / "vit/seed=0/checkpoints").exists, process, seconds=1_200)
    process.kill()
    process.communicate()
    assert (tmp_path / "mixer/seed=0/result.json").exists()
    out = finish(start(tmp_path, *arguments), seconds=1_200)
    rows = read_rows(tmp_path)
    assert [row["model"] for row in rows] == [*FAMILIES]
    flops = [row["train_flops"] for row in rows]
    assert max(flops) / min(flops) < 1.01
    assert min(row["mean"] for row in rows) > 85
    assert mentions(out, *FAMILIES, "device-seconds")
    # Nothing is left to do.
    assert finish(start(tmp_path, *arguments)) == out
