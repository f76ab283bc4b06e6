"""Tests of the door plan: one real compilation for TPUs, and what it says of wrong arguments."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mixer_jax.config.config import validate
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.distributed.tpu_env import silence_libtpu
from mixer_jax.planning.planner import Plan, make_plan
from mixer_jax.planning.report import format_plan, plan_to_dict
from mixer_jax.planning.topology import ENVIRONMENT, parse_topology
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions

S16 = "--config=configs/mixer_s16_jft.py"
L16 = "--config=configs/mixer_l16_i21k.py"
FLAGS = [
    "--config.batch_size=64",
    "--config.eval_batch_size=64",
    "--config.model.scan_unroll=1",
    "--config.model.remat=dots",
    "--config.recipe.mixup=0.2",
    "--config.recipe.grad_accum_steps=1",
    "--config.mesh.fsdp=1",
]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Plan]:
    """Mixer-S/16 with all its widths and classes, compiled for four chips that are not here."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed (requirements-tpu.txt)")
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", ENVIRONMENT["ALLOW_MULTIPLE_LIBTPU_LOAD"])
    config = load_config_with_overrides("configs/mixer_s16_jft.py", FLAGS)
    validate(config)
    # Programs for devices that are not here cannot be read back from the tests' cache.
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield make_plan(config, parse_topology("v5e:2x2"), quick=True)
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def test_real_steps_fit_where_they_should(compiled: Plan) -> None:
    assert compiled.fits
    assert compiled.training is not None
    assert compiled.evaluation is not None
    lies = compiled.estimate
    state = lies.parameters + lies.moments + lies.batch
    # Whole tiles take a little more.
    assert state <= compiled.training.arguments < 1.1 * state
    assert lies.parameters <= compiled.evaluation.arguments < 1.2 * lies.parameters
    assert 0.3 < (compiled.training.needed or 0.0) / lies.total < 3
    assert 0.3 < (compiled.evaluation.needed or 0.0) / compiled.scoring < 3
    assert not compiled.uncounted


def test_real_steps_send_gradients_and_nothing_large_else(compiled: Plan) -> None:
    sent = {(t.kind, t.dtype, t.carries): t.num_bytes for t in compiled.transfers}
    gradients = {key: num for key, num in sent.items() if key[2] == "gradients"}
    assert gradients == {("all-reduce", "f32", "gradients"): 4 * compiled.work.num_parameters}
    assert not any(t.is_unexpected for t in compiled.transfers)
    rows = sum(num for (_, _, carries), num in sent.items() if carries == "mixup rows")
    assert rows >= 224 * 224 * 3
    assert {t.axis for t in compiled.transfers} == {"data"}


def test_real_steps_move_what_they_must(compiled: Plan) -> None:
    lies = compiled.estimate
    # Parameters and moments are read and written.
    assert compiled.memory_bytes > 2 * (lies.parameters + lies.moments)
    assert compiled.memory_bytes < 100 * lies.total
    assert compiled.bound is not None
    assert compiled.cost is not None
    assert 0 < compiled.cost.model_flops_utilization <= 1
    assert compiled.cost.images_per_second == pytest.approx(64 / compiled.bound.seconds)


def test_reports(compiled: Plan) -> None:
    text = format_plan(compiled)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 45
    assert mentions(text.splitlines()[0], "Mixer-S/16", "224", "18291", "27398547")
    assert re.search(r"\bfits?\s+fits?\b", text)
    assert "WARNING" not in text
    row = json.loads(json.dumps(plan_to_dict(compiled)))
    assert row["fits"]
    assert row["settings"]["remat"] == "dots"
    assert row["training"]["needed"] == compiled.training.needed if compiled.training else False


def test_gpus_by_formula() -> None:
    done = run_cli("plan", L16, "--topology=h100:64", "--json")
    row = json.loads(done.stdout)
    assert (row["fits"], row["compiled"], row["devices"]) == (True, False, 64)
    assert sum(c["num_bytes"] for c in row["collectives"]) > 4 * row["num_parameters"]


def test_what_does_not_fit_exits_with_1() -> None:
    flags = ["--config.model.remat=none", "--config.recipe.grad_accum_steps=1"]
    config = "--config=configs/mixer_h14_jft.py"
    done = run_cli("plan", config, "--topology=a100-40:32", *flags, code=1)
    lines = done.stdout.splitlines()
    advice = [line for line in lines if line.startswith("  --")]
    assert advice[0].startswith("  --config.model.remat=")
    # It comes last, after what does not fit.
    head, tail = lines[: -len(advice)], lines[-len(advice) :]
    assert tail == advice
    assert not any("--config" in line for line in head)
    assert any(mentions(line, "training", "step", "GiB") for line in head)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([S16], ["--topology"]),
        ([S16, "--topology=v9:2x2"], ["--topology", "v9:2x2", "v2", "v3"]),
        ([S16, "--topology=v5e:8"], ["--topology", "v5e:8", "2", "v5e:1x1", "2x2"]),
        ([S16, "--topology=v4:2xtwox1"], ["--topology", "v4:2xtwox1", "3"]),
        ([S16, "--topology=h100"], ["--topology", "h100", "h100:8"]),
        ([S16, "--topology=h100:12"], ["--topology", "h100:12", "8"]),
        ([S16, "--topology=h100:8", "--slices=2"], ["--slices", "2"]),
        ([S16, "--topology=h100:8", "--sweep=depth"], ["--sweep", "depth", "remat", "fsdp"]),
        ([S16, "--topology=h100:8", "--sweep="], ["--sweep", "remat", "fsdp"]),
        (["--tables=nowhere", S16], ["--tables", "--config"]),
        (["--tables=/proc/nope"], ["/proc/nope/weak_scaling.json", "No such file"]),
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
def test_wrong_arguments(arguments: list[str], parts: list[str]) -> None:
    done = run_cli("plan", *arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
    assert not done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_sizes_that_the_compiler_does_not_know() -> None:
    done = run_cli("plan", S16, "--topology=v5e:2x3", code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "--topology", "v5e:2x3", "1x1", "2x2")


def test_a_step_too_large_is_a_result(compiled: Plan) -> None:
    assert compiled.fits  # The compiler is there, and set up.
    flags = [*FLAGS, "--config.batch_size=3072", "--config.model.remat=none"]
    config = load_config_with_overrides("configs/mixer_s16_jft.py", flags)
    plan = make_plan(config, parse_topology("v5e:2x2"), evaluation=False, quick=True)
    assert not plan.fits
    assert plan.training is not None
    assert plan.training.needed is not None
    assert plan.training.needed > plan.training.allowed == 15.75 * 2**30
    text = format_plan(plan)
    excess = f"{(plan.training.needed - plan.training.allowed) / 2**30:.1f}"
    assert any(mentions(line, "training", excess, "GiB") for line in text.splitlines())
    assert "--config.model.remat=dots" in text
