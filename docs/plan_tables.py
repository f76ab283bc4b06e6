"""Tables of plans in docs/: the paper's models on TPU slices, and weak scaling.

    python docs/plan_tables.py [FOLDER]

Writes plan_results.md and weak_scaling.md. Rows are kept in JSON files next to them, and compiled
only if they are missing or their config file has changed. Compiling all of them takes about 20
minutes on two cores. To compile a row again, remove it from its JSON file.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixer_jax.cli import common
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import RunConfig
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.models.registry import get_family
from mixer_jax.planning.cost_model import estimate_collectives, estimate_memory
from mixer_jax.planning.hlo_collectives import GRADIENTS, PARAMETERS
from mixer_jax.planning.planner import make_plan
from mixer_jax.planning.report import plan_to_dict
from mixer_jax.planning.roofline import network_seconds
from mixer_jax.planning.run_spec import RunSpec, resolve_for_platform, run_spec
from mixer_jax.planning.topology import ENVIRONMENT, GIB, device_locations, parse_topology
from mixer_jax.suites.paper_results import PAPER

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs"
COMMAND = "python docs/plan_tables.py"
_MB, _MS = 1e6, 1e3

# Config files and topologies.
RESULT_RUNS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        ("mixer_l16_i21k", topology, {})
        for topology in ("v3:4x4", "v4:2x2x4", "v5e:4x8", "v5e:8x8", "v6e:4x8", "v5p:2x2x2")
    ),
    *(("mixer_h14_jft", topology, {}) for topology in ("v4:4x4x4", "v5e:8x16")),
    *((f"mixer_{name}_jft", "v3:4x4", {}) for name in ("s32", "s16", "b32", "b16", "l32")),
    ("vit_h14_jft", "v4:4x4x4", {}),
    # Without fsdp, it does not fit.
    ("bit_r152x4_jft", "v3:16x16", {"mesh__fsdp": 8, "model__remat": "dots"}),
]
RESULT_BATCH_SIZE = 4096
# Settings tried if those of a config file do not fit, from the least recomputation to the most.
REMAT = ("dots", "mlp_hidden", "full")
MICROBATCHES = (1, 2, 4, 8)
# Compiled programs need up to about this factor more or less memory than estimated.
_ESTIMATE_TOLERANCE = 1.2

# Pre-training data by the number of classes, as the paper calls them.
_PRETRAIN_DATA = {1_000: "i1k", 21_843: "i21k", 18_291: "jft"}

# Topologies and number of slices; the largest slice of v5e is 16x16.
SCALING_RUNS = [
    *(("v5e:2x4", 1), ("v5e:4x4", 1), ("v5e:4x8", 1), ("v5e:8x8", 1)),
    *(("v5e:8x16", 1), ("v5e:16x16", 1), ("v5e:16x16", 2), ("v5e:16x16", 4)),
]
SCALING_CONFIG = "mixer_l16_i21k"
IMAGES_PER_CHIP = 64
CHECK_CONFIG = "mixer_s16_jft"
# Topologies, number of slices, and fsdp.
CHECK_RUNS = [("v5e:2x2", 1, 1), ("v5e:2x4", 1, 1), ("v5e:4x4", 1, 4), ("v5e:2x2", 2, 1)]


class RowSpec(NamedTuple):
    """One row of a table.

    Attributes:
        name: Key of the row in its JSON file.
        configured: Numbers from its config file; a row with other numbers is out of date.
        compute: Function that computes the row, which takes minutes.
    """

    name: str
    configured: dict[str, Any]
    compute: Callable[[], dict[str, Any]]

    def is_current(self, rows: dict[str, Any]) -> bool:
        """Returns whether `rows` has this row, with the numbers of the present config file."""
        return self.name in rows and rows[self.name].get("configured") == self.configured


class Table(NamedTuple):
    """A table of docs/.

    Attributes:
        name: Name of its files, NAME.json and NAME.md.
        specs: Rows.
        format_page: Function from computed rows, in order, to the Markdown page.
    """

    name: str
    specs: list[RowSpec]
    format_page: Callable[[Sequence[dict[str, Any]]], str]


def main(argv: Sequence[str]) -> int:
    """Writes the tables."""
    parser = common.ArgumentParser(prog=COMMAND, description="Write the tables of plans in docs/.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DOCS, metavar="FOLDER", help="default: docs"
    )
    args = parser.parse_args(argv)
    # JAX has been imported without these variables, but has not initialized its backends.
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
    jax.config.update("jax_enable_compilation_cache", False)
    common.configure_jax(compilation_cache="")
    write_tables(args.folder)
    return 0


def make_tables() -> list[Table]:
    """Reads the config files and returns the tables, without compiling anything.

    Raises:
        UserError: A config file cannot be read.
    """
    checks = [
        RowSpec(
            f"{topology} × {num_slices}, fsdp {fsdp}",
            _configured(_check_config(topology, num_slices, fsdp)),
            functools.partial(_check_row, topology, num_slices, fsdp),
        )
        for topology, num_slices, fsdp in CHECK_RUNS
    ]
    results = [
        RowSpec(
            f"{name} on {topology}",
            _configured(_load_config(name, batch_size=RESULT_BATCH_SIZE, **overrides)),
            functools.partial(_result_row, name, topology, overrides),
        )
        for name, topology, overrides in RESULT_RUNS
    ]
    scaling = [scaling_row(topology, num_slices) for topology, num_slices in SCALING_RUNS]
    return [
        Table("weak_scaling", checks, functools.partial(format_scaling_page, scaling)),
        Table("plan_results", results, format_results_page),
    ]


def write_tables(folder: Path) -> None:
    """Writes the tables, compiling rows that are missing or out of date.

    Each row is written as soon as it is computed, so an interrupted run can be resumed.

    Args:
        folder: Folder of the files.

    Raises:
        UserError: A config file cannot be read, or a file cannot be read or written.
    """
    for table in make_tables():
        path = folder / f"{table.name}.json"
        rows = read_rows(path)
        _write_rows(path, rows)  # Fails before compiling if the folder is not writable.
        for spec in table.specs:
            if not spec.is_current(rows):
                print(f"{table.name}: {spec.name}", file=sys.stderr, flush=True)
                extra = {"configured": spec.configured, "versions": _versions()}
                rows[spec.name] = spec.compute() | extra
                _write_rows(path, rows)
        page = table.format_page([rows[spec.name] for spec in table.specs])
        _write(folder / f"{table.name}.md", page)


def read_rows(path: Path) -> dict[str, Any]:
    """Reads the rows of a JSON file, by name; a missing file has none.

    Raises:
        UserError: The file cannot be read or has other contents.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({summarize_error(error)}). Fix or remove it."
        ) from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path} must be an object of rows. Remove it.")
    return rows


def _write_rows(path: Path, rows: dict[str, Any]) -> None:
    _write(path, json.dumps(rows, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Pass another folder."
        ) from error


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def _load_config(name: str, **overrides: Any) -> RunConfig:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return parse(load_config_with_overrides(str(CONFIGS / f"{name}.py"), flags))


def _run_spec(config: RunConfig, num_devices: int) -> RunSpec:
    return run_spec(resolve_for_platform(config, "tpu"), num_devices)


def _configured(config: RunConfig) -> dict[str, Any]:
    """Returns the numbers that a row depends on, for any number of devices."""
    run = _run_spec(config, num_devices=1)
    numbers = run._asdict()
    del numbers["num_devices"]
    # Their total size says as much as a list of all shapes.
    size = sum(math.prod(shape) for _, shape in numbers.pop("moments"))
    numbers["num_moments"] = round(size / run.num_params, 3)
    family, architecture = numbers["family"], numbers["architecture"]
    return numbers | {"family": family.name, "architecture": dataclasses.asdict(architecture)}


def _result_row(name: str, topology_name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Plans a config with its own settings or, if these do not fit, with the first that do."""
    topology = parse_topology(topology_name)
    overrides = {"batch_size": RESULT_BATCH_SIZE} | overrides
    configs = [_load_config(name, **overrides)]
    num_blocks = _run_spec(configs[0], topology.num_devices).num_blocks
    for num_microbatches in MICROBATCHES:
        for remat in REMAT:
            tried = {
                "model__scan_unroll": 1 if num_blocks else 0,
                "model__remat": remat,
                "recipe__grad_accum_steps": num_microbatches,
            }
            config = _load_config(name, **(overrides | tried))
            estimate = estimate_memory(_run_spec(config, topology.num_devices)).total
            if estimate <= topology.hbm_bytes * _ESTIMATE_TOLERANCE:
                configs.append(config)
    plan: dict[str, Any] = {}
    for config in configs:
        # Without equal blocks to scan over, a program is large and takes long to compile.
        plan = plan_to_dict(
            make_plan(config, topology, with_eval=False, fast_compile=not num_blocks)
        )
        if plan["fits"]:
            break
    return plan


def scaling_row(topology_name: str, num_slices: int) -> dict[str, float]:
    """Estimates communication and arithmetic of a step with a fixed number of images per chip."""
    topology = parse_topology(topology_name, num_slices)
    batch_size = IMAGES_PER_CHIP * topology.num_chips
    run = _run_spec(_load_config(SCALING_CONFIG, batch_size=batch_size), topology.num_devices)
    collectives = estimate_collectives(run)
    locations = device_locations(topology, None)
    chip = topology.chip
    return {
        "num_chips": topology.num_chips,
        "num_slices": num_slices,
        "batch_size": batch_size,
        "num_bytes": sum(collective.num_bytes for collective in collectives),
        "network_seconds": sum(network_seconds(topology, locations, c) for c in collectives),
        "arithmetic_seconds": run.model_flops
        / run.num_devices
        / (chip.flops / chip.devices_per_chip),
    }


def _check_row(topology_name: str, num_slices: int, fsdp: int) -> dict[str, Any]:
    """Compares the payload of a compiled step's collectives with the estimate."""
    topology = parse_topology(topology_name, num_slices)
    config = _check_config(topology_name, num_slices, fsdp)
    plan = make_plan(config, topology, with_eval=False, fast_compile=True)
    row: dict[str, Any] = {
        "num_chips": topology.num_chips,
        "num_slices": num_slices,
        "fsdp": fsdp,
    }
    found = {"compiled": plan.collectives, "estimated": estimate_collectives(plan.run)}
    for source, collectives in found.items():
        for role in (GRADIENTS, PARAMETERS):
            sizes = (c.num_bytes for c in collectives if c.tensor_role == role)
            row[f"{source}_{role}"] = sum(sizes)
    row["compiled_activations"] = sum(c.num_bytes for c in plan.collectives if c.is_unexpected)
    return row


def _check_config(topology_name: str, num_slices: int, fsdp: int) -> RunConfig:
    num_chips = parse_topology(topology_name, num_slices).num_chips
    return _load_config(
        CHECK_CONFIG,
        batch_size=IMAGES_PER_CHIP * num_chips,
        mesh__fsdp=fsdp,
        model__scan_unroll=1,
        model__remat="dots",
    )


def format_results_page(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the page about the paper's models.

    Args:
        rows: Plans as JSON objects.
    """
    lines = [
        "# Pre-training on TPU slices",
        "",
        "The training step of each variant at 224 px and 4,096 images per step, compiled for TPUs",
        f"without a TPU (`{COMMAND}`). Nothing here was measured on a TPU. The bound",
        "is a lower bound on the time of a step: the longest of arithmetic, memory traffic and",
        "network, each at its peak rate. Core-days are devices × days; a device of v2, v3 or tpu7x",
        "is half a chip. Settings are those of the config file or, if these do not fit, the first",
        f"that do of remat {', '.join(REMAT)}, then of more microbatches; BiT-R152x4 overrides",
        "`mesh.fsdp` and `model.remat`. The paper's core-days are of TPU v3. Programs marked *",
        "were compiled with `--quick`, to less optimized ones.",
        "",
        "| model | topology | chips | remat, microbatches, unroll, fsdp | fits | "
        "GiB per device (available) | bound, ms | limit | images/s | MFU at bound | days | "
        "core-days | core-days in the paper | compile, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_format_result, rows), "", *_format_versions(rows)]) + "\n"


def _format_result(row: dict[str, Any]) -> str:
    settings, step, bound, cost = row["settings"], row["train_step"], row["bound"], row["cost"]
    unroll, needed = settings["scan_unroll"], step["needed_bytes"]
    cells = [
        get_family(row["family"]).full_name(row["variant"]),
        row["topology"],
        f"{row['num_chips']}",
        f"{settings['remat']}, {settings['num_microbatches']}, {unroll or 'all'}, "
        f"{settings['fsdp']}",
        "yes" if row["fits"] else "no",
        f"{'?' if needed is None else f'{needed / GIB:.1f}'} ({row['available_bytes'] / GIB:.1f})",
    ]
    if bound:
        cells += [
            f"{bound['seconds'] * _MS:.1f}",
            bound["limit"],
            f"{cost['images_per_second']:,.0f}",
            f"{cost['model_flops_utilization']:.0%}",
            f"{cost['days']:.2f}",
            f"{cost['core_days']:,.0f}",
        ]
    else:
        cells += ["–"] * 6
    cells.append(_paper_core_days(row))
    cells.append(f"{step['compile_seconds']:.0f}{'*' if row['fast_compile'] else ''}")
    return f"| {' | '.join(cells)} |"


def _paper_core_days(row: dict[str, Any]) -> str:
    """Returns the paper's cost of the model's pre-training, or a dash."""
    model = get_family(row["family"]).full_name(row["variant"])
    data = _PRETRAIN_DATA.get(row["configured"]["num_classes"])
    core_days = [paper.core_days for paper in PAPER if (paper.model, paper.data) == (model, data)]
    return f"{core_days[0]:,}" if core_days else "–"


def format_scaling_page(
    scaling: Sequence[dict[str, float]], checks: Sequence[dict[str, Any]]
) -> str:
    """Formats the page about weak scaling.

    Args:
        scaling: Estimates from `scaling_row`.
        checks: Comparisons of estimates with compiled programs.
    """
    lines = [
        "# Weak scaling, by formula",
        "",
        f"Mixer-L/16 on ImageNet-21k, TPU v5e, {IMAGES_PER_CHIP} images per chip: communication of",
        "a step, with lower bounds on its time and on that of the arithmetic, both at peak rates.",
        "A step has one float32 all-reduce of all gradients. Up to 256 chips are one slice; more",
        "are several, connected by the data-center network. Not measured on TPUs. Written by",
        f"`{COMMAND}`.",
        "",
        "| chips | slices | images per step | MB reduced | network, ms | arithmetic, ms | "
        "network's fraction without overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in scaling:
        network, arithmetic = row["network_seconds"], row["arithmetic_seconds"]
        lines.append(
            f"| {row['num_chips']:,.0f} | {row['num_slices']} | {row['batch_size']:,.0f} "
            f"| {row['num_bytes'] / _MB:,.1f} | {network * _MS:.2f} | {arithmetic * _MS:.2f} "
            f"| {network / (network + arithmetic):.1%} |"
        )
    lines += [
        "",
        "Estimates and compiled programs of Mixer-S/16 on JFT-300M, in bytes per device and step.",
        "Between slices the compiler reduces in three stages: a scatter within each slice, a",
        "reduction between slices, a gather within each slice. The bytes of all three are added.",
        "",
        "| chips | slices | fsdp | gradients, estimated | gradients, compiled | "
        "parameters, estimated | parameters, compiled | activations, compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = (
        *(f"{source}_{GRADIENTS}" for source in ("estimated", "compiled")),
        *(f"{source}_{PARAMETERS}" for source in ("estimated", "compiled")),
        "compiled_activations",
    )
    for check in checks:
        cells = " | ".join(f"{check[column]:,.0f}" for column in columns)
        lines.append(
            f"| {check['num_chips']} | {check['num_slices']} | {check['fsdp']} | {cells} |"
        )
    return "\n".join([*lines, "", *_format_versions(checks)]) + "\n"


def _format_versions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Formats the versions of the compilers of rows, one line each."""
    versions = {(row["versions"]["jax"], row["versions"]["libtpu"]) for row in rows}
    return [f"Compiled with JAX {jax} and libtpu {libtpu}." for jax, libtpu in sorted(versions)]


if __name__ == "__main__":
    common.run_cli(main)
