"""Sweep: settings tried, ranking, interruption."""

from typing import Any

import pytest

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError
from mixer_jax.planning import sweep as sweep_module
from mixer_jax.planning.planner import Plan, make_plan
from mixer_jax.planning.roofline import RooflineBound
from mixer_jax.planning.sweep import (
    SweepPoint,
    SweepResult,
    candidates,
    current_point,
    format_ranking,
    sweep,
)
from mixer_jax.planning.topology import parse_topology
from tests.helpers.messages import mentions, raises

FLAGS = [
    "--config.recipe.grad_accum_steps=1",
    "--config.mesh.fsdp=1",
    "--config.model.remat=none",
    "--config.model.scan_unroll=0",
]


def load_config(*flags: str) -> RunConfig:
    return parse(load_config_with_overrides("configs/mixer_h14_jft.py", [*FLAGS, *flags]))


def test_sweep_ranks_fitting_settings_first(capsys: pytest.CaptureFixture[str]) -> None:
    results = sweep(load_config(), parse_topology("a100-40:64"), "remat,accumulation")
    fits = [result.fits for result in results]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    bounds = [r.plan.bound.seconds for r in results if r.fits and r.plan and r.plan.bound]
    assert bounds == sorted(bounds)
    current = [result.point for result in results if result.is_current]
    assert current == [SweepPoint(1, 1, "none", 0)]
    progress = capsys.readouterr().err.splitlines()
    assert mentions(progress[0], "16")
    assert mentions(progress[1], "1/16")


def test_sweep_rules_out_settings_by_estimate() -> None:
    topology = parse_topology("a100-40:16")
    results = sweep(load_config(), topology, "remat")
    ruled_out = [result for result in results if result.plan is None]
    assert [result.point.remat for result in ruled_out] == ["dots", "none"]
    assert all(result.estimated_bytes > 1.5 * topology.hbm_bytes for result in ruled_out)
    assert results[-2:] == ruled_out


def test_format_ranking() -> None:
    results = sweep(load_config(), parse_topology("a100-40:64"), "remat,accumulation")
    lines = format_ranking(results).splitlines()
    assert mentions(lines[-1], results[0].point.flags())
    assert max(map(len, lines[:-1])) <= 100
    assert sum(line.endswith("*") for line in lines) == 1


def test_sweep_skips_more_microbatches_than_needed() -> None:
    results = sweep(load_config(), parse_topology("h200:64"), "accumulation")
    assert [result.point.num_microbatches for result in results] == [1]


def test_sweep_tries_current_settings_besides_fewer_microbatches() -> None:
    flags = ["--config.recipe.grad_accum_steps=2", "--config.model.remat=full"]
    results = sweep(load_config(*flags), parse_topology("h200:64"), "accumulation,remat")
    by_point = {result.point: result for result in results}
    assert by_point[SweepPoint(2, 1, "full", 0)].is_current
    assert SweepPoint(1, 1, "full", 0) in by_point
    assert sum(result.is_current for result in results) == 1


@pytest.mark.parametrize("num_plans", [0, 2])
def test_sweep_ranks_results_so_far_when_interrupted(
    num_plans: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def interrupted_make_plan(*args: Any, **kwargs: Any) -> Plan:
        if len(plans) == num_plans:
            raise KeyboardInterrupt
        plans.append(make_plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(sweep_module, "make_plan", interrupted_make_plan)
    topology = parse_topology("h200:64")
    if not num_plans:
        with pytest.raises(KeyboardInterrupt):
            sweep(load_config(), topology, "remat")
        return
    results = sweep(load_config(), topology, "remat")
    assert {id(result.plan) for result in results if result.plan} == {id(plan) for plan in plans}
    assert "interrupt" in capsys.readouterr().err.lower()


@pytest.mark.parametrize("name", ["vit_h14_jft", "bit_r152x4_jft"])
def test_sweep_of_other_families_suggests_flags_of_a_valid_config(name: str) -> None:
    def load(flags: list[str]) -> RunConfig:
        return parse(load_config_with_overrides(f"configs/{name}.py", flags))

    topology = parse_topology("h200:64")
    best, *_ = sweep(load([]), topology, "fsdp,remat")
    assert best.fits
    suggested = load(best.point.flags().split())
    assert current_point(make_plan(suggested, topology).run) == best.point


def test_candidates_come_in_order_of_compile_time() -> None:
    run = make_plan(load_config(), parse_topology("h100:64")).run
    points = list(candidates(run, ("fsdp", "remat", "unroll"), parse_topology("v4:4x4x4")))
    assert points[:2] == [current_point(run), SweepPoint(1, 1, "none", 1)]
    assert [point.scan_unroll for point in points] == [0] + [1] * 8 + [4] * 8
    assert {point.fsdp for point in points} == {1, 8}
    assert {point.num_microbatches for point in points} == {1}


def test_sort_key_compares_bounds_without_overlap_next() -> None:
    plan = make_plan(load_config(), parse_topology("h200:64"))

    def sort_key(*bounds: float) -> tuple[bool, float, float, float]:
        with_bound = plan._replace(bound=RooflineBound(*bounds))
        return SweepResult(current_point(plan.run), 0.0, with_bound).sort_key

    assert sort_key(1.0, 0.5, 0.1) < sort_key(1.0, 0.5, 0.2) < sort_key(1.1, 0.1, 0.1)
    # A difference of less than a microsecond does not count.
    assert sort_key(1.000_000_1, 0.5, 0.1) < sort_key(1.0, 0.5, 0.2)


def test_sweep_checks_eval_batch_size() -> None:
    flag = "--config.eval_batch_size=100"
    with raises(UserError, "eval_batch_size", "100", "64"):
        sweep(load_config(flag), parse_topology("v4:4x4x4"), "remat")


def test_sweep_rejects_unknown_dimensions() -> None:
    with raises(UserError, "depth", "accumulation", "fsdp", "remat", "unroll"):
        sweep(load_config(), parse_topology("h100:64"), "remat,depth")
