"""The tables of docs/ that plans make: every variant on real topologies, and weak scaling."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config.config import resolve_num_steps, validate
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.planning.cost_model import RunSpec, estimate_collectives, estimate_memory, run_spec
from mixer_jax.planning.dataset_specs import placeholder_datasets, resolve_for_platform
from mixer_jax.planning.hlo.tensor_roles import GRADIENTS
from mixer_jax.planning.planner import make_plan, say
from mixer_jax.planning.report import plan_to_dict
from mixer_jax.planning.roofline import network_seconds
from mixer_jax.planning.table_pages import results_page, scaling_page
from mixer_jax.planning.topology import DeviceLocation, Topology, parse_topology

# Config files and topologies.
RESULTS = [
    *(
        ("mixer_l16_i21k", topology)
        for topology in ("v3:4x4", "v4:2x2x4", "v5e:4x8", "v5e:8x8", "v6e:4x8", "v5p:2x2x2")
    ),
    *(("mixer_h14_jft", topology) for topology in ("v4:4x4x4", "v5e:8x16")),
    *((f"mixer_{name}_jft", "v3:4x4") for name in ("s32", "s16", "b32", "b16", "l32")),
]
RESULTS_BATCH = 4096
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
# Topologies, slices, and what parameters are split over.
CHECKED = [("v5e:2x2", 1, 1), ("v5e:2x4", 1, 1), ("v5e:4x4", 1, 4), ("v5e:2x2", 2, 1)]


class RowSpec(NamedTuple):
    """One row of a table, made already or not.

    Attributes:
        name: of it in its file.
        configured: what its config file says by now, as numbers; a row that was made of others
            is made again.
        make: returns it, compiling it for minutes.
    """

    name: str
    configured: dict[str, Any]
    make: Callable[[], dict[str, Any]]

    def is_in(self, rows: dict[str, Any]) -> bool:
        """Returns whether rows of a file hold it as its config file is by now."""
        return self.name in rows and rows[self.name].get("configured") == self.configured


class Table(NamedTuple):
    """A table of docs/.

    Attributes:
        name: of its two files, NAME.json and NAME.md.
        wanted: its rows.
        page: from these, in their order, to the text.
    """

    name: str
    wanted: list[RowSpec]
    page: Callable[[Sequence[dict[str, Any]]], str]


def tables() -> list[Table]:
    """Returns the tables; reads the config files, compiles nothing.

    Raises:
        UserError: a config file cannot be read.
    """
    checks = [
        RowSpec(
            f"{name} × {slices}, fsdp {fsdp}",
            _configured(_check_config(name, slices, fsdp)),
            functools.partial(_check_row, name, slices, fsdp),
        )
        for name, slices, fsdp in CHECKED
    ]
    results = [
        RowSpec(
            f"{name} on {topology}",
            _configured(_config(name, batch_size=RESULTS_BATCH)),
            functools.partial(_result_row, name, topology),
        )
        for name, topology in RESULTS
    ]
    scaling = [scaling_row(name, slices) for name, slices in SCALING]
    return [
        Table("weak_scaling", checks, lambda rows: scaling_page(scaling, SCALING_ROWS, rows)),
        Table("plan_results", results, lambda rows: results_page(rows, _REMAT)),
    ]


def write_tables(folder: Path) -> None:
    """Writes plan_results.md and weak_scaling.md, compiling what is not in the JSON beside them.

    Rows are written as they are finished, so that a run that was stopped goes on where it was.
    A row whose config file has changed is made again; to make another again, remove it.

    Args:
        folder: that they are written to, e.g. docs.

    Raises:
        UserError: a config file cannot be read, or a file of the folder not read or written.
    """
    for table in tables():
        path = folder / f"{table.name}.json"
        rows = read_rows(path)
        _write_rows(path, rows)  # A folder that cannot be written is told before compiling.
        for wanted in table.wanted:
            if not wanted.is_in(rows):
                say(f"{table.name}: {wanted.name}")
                made = {"configured": wanted.configured, "versions": _versions()}
                rows[wanted.name] = wanted.make() | made
                _write_rows(path, rows)
        page = table.page([rows[wanted.name] for wanted in table.wanted])
        _write(folder / f"{table.name}.md", page)


def read_rows(path: Path) -> dict[str, Any]:
    """Returns the rows of a file by name; none where there is no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({summarize_error(error)}); mend or remove it"
        ) from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path} holds no rows of a table; remove it")
    return rows


def _write_rows(path: Path, rows: dict[str, Any]) -> None:
    _write(path, json.dumps(rows, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); pass --tables another folder"
        ) from error


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def _configured(config: ConfigDict) -> dict[str, Any]:
    """Returns what a row follows from, as JSON holds it: the run in numbers, on any devices."""
    numbers = _work(config, devices=1)._asdict()
    del numbers["devices"]
    return numbers | {"widths": dataclasses.asdict(numbers["widths"])}


def _config(name: str, **changes: Any) -> ConfigDict:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = load_config_with_overrides(f"configs/{name}.py", flags)
    validate(config)
    return config


def _work(config: ConfigDict, devices: int) -> RunSpec:
    config = resolve_for_platform(config, "tpu")
    source = placeholder_datasets(config).train
    steps = resolve_num_steps(config, len(source))
    return run_spec(config, source.num_classes, steps, devices)


def _result_row(name: str, on: str) -> dict[str, Any]:
    """Returns the plan of a config as it is or, where that does not fit, of what does."""
    topology = parse_topology(on)
    configs = [_config(name, batch_size=RESULTS_BATCH)]
    for pieces in _PIECES:
        for remat in _REMAT:
            changes = {"model__remat": remat, "recipe__grad_accum_steps": pieces}
            config = _config(name, batch_size=RESULTS_BATCH, model__scan_unroll=1, **changes)
            if (
                estimate_memory(_work(config, topology.num_devices)).total
                <= topology.allowed * _MARGIN
            ):
                configs.append(config)
    plan: dict[str, Any] = {}
    for config in configs:
        plan = plan_to_dict(make_plan(config, topology, evaluation=False))
        if plan["fits"]:
            break
    return plan


def mesh_locations(topology: Topology) -> list[DeviceLocation]:
    """Returns places of a TPU's devices as a mesh lays them out: slice by slice, chip by chip."""
    in_slice = topology.num_devices // topology.slices
    return [
        DeviceLocation(number // topology.chip.devices_per_chip, number // in_slice)
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
    work = _work(_config(SCALING_CONFIG, batch_size=batch), topology.num_devices)
    sent = estimate_collectives(work)
    places = mesh_locations(topology)
    flops = work.model_flops / work.devices
    return {
        "chips": topology.num_chips,
        "slices": slices,
        "batch": batch,
        "bytes": sum(transfer.num_bytes for transfer in sent),
        "network": sum(network_seconds(topology, places, transfer) for transfer in sent),
        "arithmetic": flops / (topology.chip.flops / topology.chip.devices_per_chip),
    }


def _check_row(name: str, slices: int, fsdp: int) -> dict[str, Any]:
    """Returns the gradients that a compiled step sends, and those of the formula."""
    topology = parse_topology(name, slices)
    config = _check_config(name, slices, fsdp)
    plan = make_plan(config, topology, evaluation=False, quick=True)
    found: dict[str, Any] = {"chips": topology.num_chips, "slices": slices, "fsdp": fsdp}
    for key, sent in (
        ("compiled", plan.transfers),
        ("formula", estimate_collectives(plan.work)),
    ):
        found[key] = sum(t.num_bytes for t in sent if t.carries == GRADIENTS)
        found[f"{key}_parameters"] = sum(t.num_bytes for t in sent if t.carries == "parameters")
    found["activations"] = sum(t.num_bytes for t in plan.transfers if t.is_unexpected)
    return found


def _check_config(name: str, slices: int, fsdp: int) -> ConfigDict:
    return _config(
        CHECKED_CONFIG,
        batch_size=SCALING_ROWS * parse_topology(name, slices).num_chips,
        mesh__fsdp=fsdp,
        model__scan_unroll=1,
        model__remat="dots",
    )
