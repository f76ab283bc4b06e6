"""The plan command: results by formula, exit codes, usage errors."""

import importlib.util
import json

import pytest

from mixer_jax import plan
from mixer_jax.errors import UserError
from mixer_jax.planning.topology import ENVIRONMENT
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises

S16 = "--config=configs/mixer_s16_jft.py"
L16 = "--config=configs/mixer_l16_i21k.py"
H14 = "--config=configs/mixer_h14_jft.py"


@pytest.fixture
def restore_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables that the command sets are restored after the test."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("restore_env")
def test_plan_for_gpus_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([L16, "--topology=h100:64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["fits"], result["compiled"], result["num_devices"]) == (True, False, 64)
    assert sum(c["num_bytes"] for c in result["collectives"]) > 4 * result["num_params"]


@pytest.mark.usefixtures("restore_env")
def test_plan_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([L16, "--topology=h100:64", "--sweep=remat", "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)
    assert ranking["results"][0]["fits"]
    remat = ranking["results"][0]["settings"]["remat"]
    assert f"--config.model.remat={remat}" in ranking["best"].split()


def test_plan_that_does_not_fit_suggests_flags_and_exits_with_1() -> None:
    flags = ["--config.model.remat=none", "--config.recipe.grad_accum_steps=1"]
    lines = run_cli("plan", H14, "--topology=a100-40:32", *flags, code=1).stdout.splitlines()
    suggestions = [line for line in lines if line.startswith("  --")]
    assert suggestions[0].startswith("  --config.model.remat=")
    # They come last, after the step that does not fit.
    report, last_lines = lines[: -len(suggestions)], lines[-len(suggestions) :]
    assert last_lines == suggestions
    assert not any("--config" in line for line in report)
    assert any(mentions(line, "training", "step", "GiB") for line in report)


@pytest.mark.usefixtures("restore_env")
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([S16], ["--topology"]),
        (["--topology=h100:8"], ["--config"]),
        ([S16, "--topology=v9:2x2"], ["--topology", "v9:2x2", "v2", "v3"]),
        ([S16, "--topology=v5e:8"], ["--topology", "v5e:8", "2", "v5e:1x1", "2x2"]),
        ([S16, "--topology=v4:2xtwox1"], ["--topology", "v4:2xtwox1", "3"]),
        ([S16, "--topology=h100"], ["--topology", "h100", "h100:8"]),
        ([S16, "--topology=h100:12"], ["--topology", "h100:12", "8"]),
        ([S16, "--topology=h100:8", "--slices=2"], ["--slices", "2"]),
        ([S16, "--topology=v5e:2x2", "--slices=0"], ["--slices", "0", "1"]),
        ([S16, "--topology=h100:8", "--sweep=depth"], ["--sweep", "depth", "remat", "fsdp"]),
        ([S16, "--topology=h100:8", "--sweep="], ["--sweep", "remat", "fsdp"]),
        (
            [S16, "--topology=h100:24", "--config.recipe.grad_accum_steps=1"],
            ["batch_size", "4096", "24", "4080", "4104"],
        ),
        (
            [S16, "--topology=h100:8", "--config.mesh.fsdp=3"],
            ["mesh.data", "0", "mesh.fsdp", "3", "8"],
        ),
        (
            ["--config=configs/digits.py", "--topology=h100:8", "--config.dataset.name=mine"],
            ["dataset.num_classes", "0"],
        ),
        (
            [S16, "--topology=h100:8", "--config.model.variant=init_from"],
            ["model.variant", "init_from"],
        ),
    ],
)
def test_plan_rejects(argv: list[str], parts: list[str]) -> None:
    with raises(UserError, *parts):
        plan.main(argv)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_plan_reports_sizes_unknown_to_the_compiler_in_one_line() -> None:
    done = run_cli("plan", S16, "--topology=v5e:2x3", code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "--topology", "v5e:2x3", "1x1", "2x2")
    assert not done.stdout
