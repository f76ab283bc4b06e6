"""Tests of what a sweep tries, of its ranking, and of advice where a run does not fit."""

import dataclasses
from typing import Any

import pytest
from ml_collections import ConfigDict

from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.errors import UserError
from mixer_jax.planning import sweep as sweep_module
from mixer_jax.planning.aot_compile import OutOfMemory, parse_oom
from mixer_jax.planning.cost_model import estimate_memory
from mixer_jax.planning.planner import Plan, make_plan, to_compiled_step
from mixer_jax.planning.report import format_plan
from mixer_jax.planning.roofline import RooflineBound
from mixer_jax.planning.suggestions import suggest_flags
from mixer_jax.planning.sweep import (
    SweepPoint,
    SweepResult,
    candidates,
    current_point,
    format_ranking,
    sweep,
)
from mixer_jax.planning.topology import GIB, larger_topologies, parse_topology
from tests.helpers.messages import mentions, raises

OUT = "RESOURCE_EXHAUSTED: "
TEMPORARIES = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (34.87G) exceeds "
    "available HBM (15.75G)."
)
ON_CHIP = (
    "Ran out of memory in memory space vmem. Used 17.08M of 16.00M vmem. Exceeded vmem capacity "
    "by 1.08M."
)
WHOLE = (
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.08G of "
    "15.75G hbm. Exceeds hbm capacity by 1.33G."
)


PLAIN = [
    "--config.recipe.grad_accum_steps=1",
    "--config.mesh.fsdp=1",
    "--config.model.remat=none",
    "--config.model.scan_unroll=0",
]


def mentions_excess(text: str, step: str, num_bytes: float) -> bool:
    """Returns whether a line of a report says by how much a step does not fit."""
    excess = f"{num_bytes / GIB:.1f}"
    return any(mentions(line, step, excess, "GiB") for line in text.splitlines())


def config(*flags: str) -> ConfigDict:
    return load_config_with_overrides("configs/mixer_h14_jft.py", [*PLAIN, *flags])


def test_sweep_ranks_what_fits_first(capsys: pytest.CaptureFixture[str]) -> None:
    results = sweep(config(), parse_topology("a100-40:64"), "remat,accumulation")
    fits = [result.fits for result in results]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    bounds = [r.plan.bound.seconds for r in results if r.fits and r.plan and r.plan.bound]
    assert bounds == sorted(bounds)
    text = format_ranking(results)
    assert mentions(text.splitlines()[-1], results[0].setting.flags())
    assert max(map(len, text.splitlines()[:-1])) <= 100
    # What is configured does not fit, and is ruled out by the estimate.
    assert [result.setting for result in results if result.is_present] == [
        current_point(results[0].plan.work)._replace(pieces=1, remat="none")
        if results[0].plan
        else None
    ]
    assert sum(line.endswith("*") for line in text.splitlines()) == 1
    told_on_the_way = capsys.readouterr().err.splitlines()
    assert mentions(told_on_the_way[0], "16")
    assert mentions(told_on_the_way[1], "1/16")


def test_more_pieces_are_not_tried_where_fewer_fit() -> None:
    results = sweep(config(), parse_topology("h200:64"), "accumulation")
    assert [result.setting.pieces for result in results] == [1]


def test_ctrl_c_ranks_what_was_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    topology, tried = parse_topology("h200:64"), list[Plan]()

    def interrupted_at(second: int) -> None:
        def make(*arguments: Any, **settings: Any) -> Plan:
            if len(tried) == second:
                raise KeyboardInterrupt
            tried.append(make_plan(*arguments, **settings))
            return tried[-1]

        tried.clear()
        monkeypatch.setattr(sweep_module, "make_plan", make)

    interrupted_at(2)
    results = sweep(config(), topology, "remat")
    assert [result.plan for result in results if result.plan] != []
    assert {id(result.plan) for result in results if result.plan} == {id(plan) for plan in tried}
    assert "interrupt" in capsys.readouterr().err.lower()
    interrupted_at(0)
    with pytest.raises(KeyboardInterrupt):
        sweep(config(), topology, "remat")


def test_what_compiles_fast_comes_first() -> None:
    plan = make_plan(config(), parse_topology("h100:64"))
    tpu = parse_topology("v4:4x4x4")
    found = list(candidates(plan.work, ("fsdp", "remat", "unroll"), tpu))
    assert found[:2] == [current_point(plan.work), SweepPoint(1, 1, "none", 1)]
    assert [setting.unroll for setting in found] == [0] + [1] * 8 + [4] * 8
    assert {setting.fsdp for setting in found} == {1, 8}
    assert {setting.pieces for setting in found} == {1}


def test_what_is_configured_is_tried_first_and_hinders_nothing() -> None:
    flags = ["--config.recipe.grad_accum_steps=2", "--config.model.remat=full"]
    results = sweep(config(*flags), parse_topology("h200:64"), "accumulation,remat")
    tried = {result.setting: result for result in results}
    assert tried[SweepPoint(2, 1, "full", 0)].is_present
    assert SweepPoint(1, 1, "full", 0) in tried
    assert sum(result.is_present for result in results) == 1


def test_of_equal_bounds_what_sends_less_comes_first() -> None:
    plan = make_plan(config(), parse_topology("h200:64"))

    def rank(*parts: float) -> tuple[bool, float, float, float]:
        return SweepResult(
            current_point(plan.work), 0.0, plan._replace(bound=RooflineBound(*parts))
        ).rank

    assert rank(1.0, 0.5, 0.1) < rank(1.0, 0.5, 0.2) < rank(1.1, 0.1, 0.1)
    # Less than a microsecond is no difference.
    assert rank(1.000_000_1, 0.5, 0.1) < rank(1.0, 0.5, 0.2)


def test_batches_that_are_scored_must_divide() -> None:
    flag = "--config.eval_batch_size=100"
    with raises(UserError, "eval_batch_size", "100", "64"):
        sweep(config(flag), parse_topology("v4:4x4x4"), "remat")


def test_what_is_only_scored_must_fit_too() -> None:
    plan = make_plan(config("--config.eval_batch_size=1048576"), parse_topology("h200:64"))
    assert plan.train_step_fits
    assert not plan.fits
    text = format_plan(plan)
    assert mentions_excess(text, "evaluation", plan.scoring - plan.allowed)
    assert mentions(text, "eval_batch_size", "1048576")
    # Nothing else would help.
    assert "--" not in text


def test_unknown_dimensions() -> None:
    with raises(UserError, "depth", "accumulation", "fsdp", "remat", "unroll"):
        sweep(config(), parse_topology("h100:64"), "remat,depth")


def test_advice_is_computed() -> None:
    plan = make_plan(config("--config.eval_batch_size=4096"), parse_topology("a100-40:32"))
    assert not plan.fits
    flags = suggest_flags(plan)
    assert any(flag.startswith("--config.model.remat=") for flag in flags)
    assert any(flag.startswith("--config.recipe.grad_accum_steps=") for flag in flags)
    remat = next(flag for flag in flags if "remat" in flag).split()[0]
    again = make_plan(config(remat), parse_topology("a100-40:32"))
    assert again.fits
    assert remat in format_plan(plan)


@pytest.mark.parametrize("devices", [8, 32])
def test_each_piece_of_advice_can_be_followed(devices: int) -> None:
    topology = f"--topology=a100-40:{devices}"
    flags = ["--config.mesh.fsdp=2", f"--config.mesh.data={devices // 2}"]
    flags += [f"--config.batch_size={96 * devices}", "--config.eval_batch_size=192"]
    plan = make_plan(config(*flags), parse_topology(topology[len("--topology=") :]))
    assert not plan.fits
    lines = suggest_flags(plan)
    assert len(lines) == 4
    for line in lines:
        given = [word for word in line.split() if word.startswith("--")]
        on = next((flag for flag in given if flag.startswith("--topology=")), topology)
        changes = [flag for flag in given if flag != on]
        again = make_plan(config(*flags, *changes), parse_topology(on[len("--topology=") :]))
        assert again.fits, line


@pytest.mark.parametrize(
    ("name", "slices", "sizes"),
    [
        ("h100:2", 1, [4, 8, 16, 32, 64, 128, 256]),
        ("h100:3", 1, [6, 24, 48, 96, 192, 384]),
        ("h100:24", 1, [48, 96, 192, 384, 768, 1536, 3072]),
        ("v5e:8x8", 2, [256, 512]),
        ("v3:8x16", 1, [256]),
    ],
)
def test_larger_topologies_are_such_as_there_are(name: str, slices: int, sizes: list[int]) -> None:
    found = larger_topologies(parse_topology(name, slices))
    assert [topology.num_chips for topology in found] == sizes
    assert {topology.slices for topology in found} == {slices}


@pytest.mark.parametrize(("gib", "fsdp"), [(28, ["2"]), (26.5, ["4"]), (25.8, [])])
def test_advice_splits_within_a_slice(gib: float, fsdp: list[str]) -> None:
    plan = make_plan(config(), parse_topology("h100:64"))
    topology = parse_topology("v5e:2x2", 16)
    chip = dataclasses.replace(topology.chip, memory_gib=gib)
    # 8 would do, but a slice has four devices.
    assert estimate_memory(plan.work._replace(fsdp=8)).total < 25.8 * GIB
    plan = plan._replace(topology=topology._replace(chip=chip))
    splits = [line.split()[0] for line in suggest_flags(plan) if "mesh.fsdp" in line]
    assert splits == [f"--config.mesh.fsdp={number}" for number in fsdp]


@pytest.mark.parametrize(
    ("text", "needed", "only_temporaries"), [(TEMPORARIES, 34.87, True), (WHOLE, 17.08, False)]
)
def test_what_the_compiler_says_of_too_large_a_step(
    text: str, needed: float, only_temporaries: bool
) -> None:
    found = parse_oom(RuntimeError(OUT + text), 3.0)
    assert found == OutOfMemory(3.0, needed * GIB, 15.75 * GIB, "", only_temporaries)
    plan = make_plan(config(), parse_topology("h100:64"))
    step = to_compiled_step(found, plan.topology, state=GIB)
    assert not step.fits
    assert step.needed == (needed + only_temporaries) * GIB
    text = format_plan(plan._replace(training=step, bound=None, cost=None))
    assert mentions_excess(text, "training", step.needed - step.allowed)


@pytest.mark.parametrize("said", [ON_CHIP, "Something that compilers of another year say."])
def test_what_the_compiler_says_otherwise_is_passed_on(said: str) -> None:
    found = parse_oom(RuntimeError(OUT + said), 3.0)
    assert (found.needed, found.said) == (None, OUT + said)
    plan = make_plan(config(), parse_topology("h100:64"))
    step = to_compiled_step(found, plan.topology, state=GIB)
    text = format_plan(plan._replace(training=step, bound=None, cost=None))
    refusal = text.split("\n\n")[-1]
    assert said in " ".join(refusal.split())
    # Neither advice nor an amount.
    assert "--" not in text
    assert "GiB" not in refusal
    assert max(map(len, text.splitlines())) <= 100


def test_loops_that_are_not_understood_are_told() -> None:
    plan = make_plan(config("--config.model.remat=full"), parse_topology("h200:64"))
    assert "WARNING" not in format_plan(plan)
    text = format_plan(plan._replace(uncounted=2))
    assert any(mentions(line, "WARNING", "2") for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 100


def test_other_errors_are_not_hidden() -> None:
    with raises(RuntimeError, "broken"):
        parse_oom(RuntimeError("INTERNAL: broken"), 0.0)
