"""Tests of what a sweep tries, of its ranking, and of advice where a run does not fit."""

import pytest
from ml_collections import ConfigDict

from mixer_jax.config_file import read_config
from mixer_jax.errors import UserError
from mixer_jax.planning.advice import advice
from mixer_jax.planning.compiling import TooLarge, read_too_large
from mixer_jax.planning.planner import make_plan, step_of
from mixer_jax.planning.report import told
from mixer_jax.planning.sweep import Setting, candidates, ranked, sweep
from mixer_jax.planning.topology import parse_topology

GIB = 2**30
OUT = "RESOURCE_EXHAUSTED: "
TEMPORARIES = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (34.87G) exceeds "
    "available HBM (15.75G)."
)
WHOLE = (
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.08G of "
    "15.75G hbm. Exceeds hbm capacity by 1.33G."
)


PLAIN = [
    "--config.recipe.accumulation_steps=1",
    "--config.mesh.fsdp=1",
    "--config.model.remat=none",
    "--config.model.unroll=0",
]


def config(*flags: str) -> ConfigDict:
    return read_config("configs/mixer_h14_jft.py", [*PLAIN, *flags])


def test_sweep_ranks_what_fits_first(capsys: pytest.CaptureFixture[str]) -> None:
    results = sweep(config(), parse_topology("a100-40:64"), "remat,accumulation")
    fits = [result.fits for result in results]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    bounds = [r.plan.bound.seconds for r in results if r.fits and r.plan and r.plan.bound]
    assert bounds == sorted(bounds)
    text = ranked(results)
    assert f"best: {results[0].setting.flags()}" in text
    assert max(map(len, text.splitlines()[:-1])) <= 100
    told_on_the_way = capsys.readouterr().err.splitlines()
    assert "settings may fit" in told_on_the_way[0]
    assert told_on_the_way[1].startswith("[1/")


def test_more_pieces_are_not_tried_where_fewer_fit() -> None:
    results = sweep(config(), parse_topology("h200:64"), "accumulation")
    assert [result.setting.pieces for result in results] == [1]


def test_what_compiles_fast_comes_first() -> None:
    plan = make_plan(config(), parse_topology("h100:64"))
    tpu = parse_topology("v4:4x4x4")
    found = list(candidates(plan.work, ("fsdp", "remat", "unroll"), tpu))
    assert found[0] == Setting(1, 1, "none", 1)
    assert [setting.unroll for setting in found] == [1] * 8 + [4] * 8
    assert {setting.fsdp for setting in found} == {1, 8}
    assert {setting.pieces for setting in found} == {1}


def test_unknown_dimensions() -> None:
    with pytest.raises(UserError, match="'depth' is unknown; choose of accumulation, fsdp"):
        sweep(config(), parse_topology("h100:64"), "remat,depth")


def test_advice_is_computed() -> None:
    plan = make_plan(config("--config.eval_batch_size=4096"), parse_topology("a100-40:32"))
    assert not plan.fits
    flags = advice(plan)
    assert any(flag.startswith("--config.model.remat=") for flag in flags)
    assert any(flag.startswith("--config.recipe.accumulation_steps=") for flag in flags)
    remat = next(flag for flag in flags if "remat" in flag).split()[0]
    again = make_plan(config(remat), parse_topology("a100-40:32"))
    assert again.fits
    assert remat in told(plan)


@pytest.mark.parametrize(
    ("text", "needed", "only_temporaries"), [(TEMPORARIES, 34.87, True), (WHOLE, 17.08, False)]
)
def test_what_the_compiler_says_of_too_large_a_step(
    text: str, needed: float, only_temporaries: bool
) -> None:
    found = read_too_large(RuntimeError(OUT + text), 3.0)
    assert found == TooLarge(3.0, needed * GIB, 15.75 * GIB, only_temporaries)
    plan = make_plan(config(), parse_topology("h100:64"))
    step = step_of(found, plan.work, plan.topology)
    assert not step.fits
    assert (step.needed > found.needed) == only_temporaries
    text = told(plan._replace(training=step, bound=None, cost=None))
    assert "the training step does not fit: about" in text


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        read_too_large(RuntimeError("INTERNAL: broken"), 0.0)
