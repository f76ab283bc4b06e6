"""The tables of docs/ that plans make: every variant on real topologies, and weak scaling."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config import resolve_num_steps, validate
from mixer_jax.config_file import read_config
from mixer_jax.planning.carried import GRADIENTS
from mixer_jax.planning.formulas import Work, memory, transfers_by_formula, work_of
from mixer_jax.planning.nominal import nominal_sources, plannable
from mixer_jax.planning.planner import GIB, make_plan, say
from mixer_jax.planning.report import as_json
from mixer_jax.planning.roofline import network_seconds
from mixer_jax.planning.topology import Place, Topology, parse_topology

_COMMAND = "python -m mixer_jax.plan --tables=docs"
_MB, _MS = 1e6, 1e3


class Row(NamedTuple):
    """One plan of a table: a config file on a topology."""

    config: str
    topology: str


RESULTS = [
    *(
        Row("mixer_l16_i21k", topology)
        for topology in ("v3:4x4", "v4:2x2x4", "v5e:4x8", "v5e:8x8", "v6e:4x8", "v5p:2x2x2")
    ),
    *(Row("mixer_h14_jft", topology) for topology in ("v4:4x4x4", "v5e:8x16")),
    *(Row(f"mixer_{name}_jft", "v3:4x4") for name in ("s32", "s16", "b32", "b16", "l32")),
]
# What is tried in turn where a config does not fit: first what computes least a second time.
_REMAT = ("dots", "mlp_hidden", "full")
_PIECES = (1, 2, 4, 8)
# Compilers need about so much more or less than estimated.
_MARGIN = 1.2

# Of v5e, 16x16 is the largest slice.
SCALING = [
    *(("v5e:2x4", 1), ("v5e:4x4", 1), ("v5e:4x8", 1), ("v5e:8x8", 1)),
    *(("v5e:8x16", 1), ("v5e:16x16", 1), ("v5e:16x16", 2), ("v5e:16x16", 4)),
]
SCALING_CONFIG = "mixer_l16_i21k"
SCALING_ROWS = 64
CHECKED_CONFIG = "mixer_s16_jft"
CHECKED = [("v5e:2x2", 1, 1), ("v5e:2x4", 1, 1), ("v5e:4x4", 1, 4), ("v5e:2x2", 2, 1)]


def write_tables(folder: Path) -> None:
    """Writes plan_results.md and weak_scaling.md, compiling what is not in the JSON beside them.

    Rows are written as they are finished, so that a run that was stopped goes on where it was.
    To compile a row again, remove it, or the file.

    Args:
        folder: that they are written to, e.g. docs.

    Raises:
        UserError: a config file cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checks = _finished(
        folder / "weak_scaling.json",
        [f"{name} × {slices}, fsdp {fsdp}" for name, slices, fsdp in CHECKED],
        lambda number: _check_row(*CHECKED[number]),
    )
    (folder / "weak_scaling.md").write_text(_scaling_page(checks), encoding="utf-8")
    results = _finished(
        folder / "plan_results.json",
        [f"{row.config} on {row.topology}" for row in RESULTS],
        lambda number: _result_row(RESULTS[number]),
    )
    (folder / "plan_results.md").write_text(_results_page(results), encoding="utf-8")


def _finished(
    path: Path, names: Sequence[str], make: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row for each name: those in a file, and others made and added to it."""
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for number, name in enumerate(names):
        if name not in rows:
            say(f"{path.stem}: {name}")
            rows[name] = make(number)
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return [rows[name] for name in names]


def _config(name: str, **changes: Any) -> ConfigDict:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = read_config(f"configs/{name}.py", flags)
    validate(config)
    return config


def _work(config: ConfigDict, topology: Topology) -> Work:
    config = plannable(config)
    source = nominal_sources(config).train
    steps = resolve_num_steps(config, len(source))
    return work_of(config, source.num_classes, steps, topology.num_devices)


def _result_row(row: Row) -> dict[str, Any]:
    """Returns the plan of a config as it is or, where that does not fit, of what does."""
    topology = parse_topology(row.topology)
    allowed = topology.chip.memory_gib * GIB
    configs = [_config(row.config, batch_size=4096)]
    for pieces in _PIECES:
        for remat in _REMAT:
            changes = {"model__remat": remat, "recipe__accumulation_steps": pieces}
            config = _config(row.config, batch_size=4096, model__unroll=1, **changes)
            if memory(_work(config, topology)).total <= allowed * _MARGIN:
                configs.append(config)
    plan: dict[str, Any] = {}
    for config in configs:
        plan = as_json(make_plan(config, topology, evaluation=False))
        if plan["fits"]:
            break
    return plan


def _results_page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What pre-training would take",
        "",
        "The real training step of every variant, 224 px, 4,096 images a step, compiled for TPUs",
        f"that were not there (`{_COMMAND}`). Nothing here was",
        "measured on a TPU. The bound is a floor: the longest of arithmetic, memory traffic and",
        "network, each at its peak rate. Core-days are devices × days; a device of v2, v3 or tpu7x",
        "is half a chip. Settings are those of the config file or, where these do not fit, the",
        f"first that do of remat {', '.join(_REMAT)}, then of more pieces a batch.",
        "",
        "| model | topology | chips | remat, pieces, unroll | fits | GiB a device (allowed) | "
        "bound, ms | limit | images/s | MFU at bound | days | core-days | compile, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_result_line, rows)]) + "\n"


def _result_line(row: dict[str, Any]) -> str:
    settings, step, least, run = row["settings"], row["training"], row["bound"], row["cost"]
    fits = "yes" if row["fits"] else "no"
    cells = [
        row["variant"],
        row["topology"],
        f"{row['chips']}",
        f"{settings['remat']}, {settings['accumulation_steps']}, {settings['unroll'] or 'all'}",
        fits,
        f"{step['needed'] / GIB:.1f} ({row['allowed_bytes'] / GIB:.1f})",
        *(
            [
                f"{least['seconds'] * _MS:.1f}",
                least["limit"],
                f"{run['images_per_second']:,.0f}",
                f"{run['model_flops_utilization']:.0%}",
                f"{run['days']:.2f}",
                f"{run['core_days']:,.0f}",
            ]
            if least
            else ["–"] * 6
        ),
        f"{step['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def formula_places(topology: Topology) -> list[Place]:
    """Returns places of a TPU's devices as a mesh lays them out: slice by slice, chip by chip."""
    in_slice = topology.num_devices // topology.slices
    return [
        Place(number // topology.chip.devices, number // in_slice)
        for number in range(topology.num_devices)
    ]


def scaling_row(name: str, slices: int) -> dict[str, float]:
    """Returns what a step sends on this many chips, 64 images on each, by formula.

    Args:
        name: of a topology.
        slices: of it.
    """
    topology = parse_topology(name, slices)
    batch = SCALING_ROWS * topology.num_chips
    work = _work(_config(SCALING_CONFIG, batch_size=batch), topology)
    sent = transfers_by_formula(work)
    places = formula_places(topology)
    flops = work.model_flops / work.devices
    return {
        "chips": topology.num_chips,
        "batch": batch,
        "bytes": sum(transfer.num_bytes for transfer in sent),
        "network": sum(network_seconds(topology, places, transfer) for transfer in sent),
        "arithmetic": flops / (topology.chip.flops / topology.chip.devices),
    }


def _check_row(name: str, slices: int, fsdp: int) -> dict[str, Any]:
    """Returns the gradients that a compiled step sends, and those of the formula."""
    topology = parse_topology(name, slices)
    batch = SCALING_ROWS * topology.num_chips
    config = _config(
        CHECKED_CONFIG,
        batch_size=batch,
        mesh__fsdp=fsdp,
        model__unroll=1,
        model__remat="dots",
    )
    plan = make_plan(config, topology, evaluation=False, quick=True)
    found: dict[str, Any] = {"chips": topology.num_chips, "slices": slices, "fsdp": fsdp}
    for key, sent in (
        ("compiled", plan.transfers),
        ("formula", transfers_by_formula(plan.work)),
    ):
        found[key] = sum(t.num_bytes for t in sent if t.carries == GRADIENTS)
        found[f"{key}_parameters"] = sum(t.num_bytes for t in sent if t.carries == "parameters")
    found["activations"] = sum(t.num_bytes for t in plan.transfers if t.is_suspicious)
    return found


def _scaling_page(checks: list[dict[str, Any]]) -> str:
    lines = [
        "# Weak scaling, by formula",
        "",
        f"Mixer-L/16 on ImageNet-21k, TPU v5e, {SCALING_ROWS} images a chip: what a step sends,",
        "and how long that takes at the least beside its arithmetic, both at peak rates. One",
        "float32 all-reduce of all gradients a step. Up to 256 chips are one slice; more are",
        "several, joined by the data-centre network. Not measured on TPUs. Made by",
        f"`{_COMMAND}`.",
        "",
        "| chips | slices | images a step | MB summed | network, ms | arithmetic, ms | "
        "network's share, not overlapped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, slices in SCALING:
        row = scaling_row(name, slices)
        share = row["network"] / (row["network"] + row["arithmetic"])
        lines.append(
            f"| {row['chips']:,.0f} | {slices} | {row['batch']:,.0f} | {row['bytes'] / _MB:,.1f} "
            f"| {row['network'] * _MS:.2f} | {row['arithmetic'] * _MS:.2f} | {share:.1%} |"
        )
    lines += [
        "",
        "The formula beside compiled programs, Mixer-S/16 on JFT-300M, bytes a device and step.",
        "Over slices the compiler sums in three legs: scattered within a slice, between slices,",
        "gathered within a slice; the bytes of all three are added.",
        "",
        "| chips | slices | fsdp | gradients, formula | gradients, compiled | parameters, formula "
        "| parameters, compiled | activations, compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check in checks:
        numbers = [
            check[key]
            for key in (
                "formula",
                "compiled",
                "formula_parameters",
                "compiled_parameters",
                "activations",
            )
        ]
        lines.append(
            f"| {check['chips']} | {check['slices']} | {check['fsdp']} | "
            + " | ".join(f"{number:,.0f}" for number in numbers)
            + " |"
        )
    return "\n".join(lines) + "\n"
