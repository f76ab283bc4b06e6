"""Plan a run on accelerators that are not here: does it fit, what moves, how long, what it costs.

    python -m mixer_jax.plan --config=configs/mixer_l16_i21k.py --topology=v5e:8x8
    python -m mixer_jax.plan --config=configs/mixer_h14_jft.py --topology=v4:4x4x4 --sweep

The real training and evaluation step are compiled by the TPU's own compiler, without a TPU; of
GPUs all is told by formula. Reads no data.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mixer_jax.cli import common
from mixer_jax.config.config import validate
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.errors import UserError

_FITS, _TOO_LARGE = 0, 1


def main(arguments: Sequence[str]) -> int:
    """Plans as the command line says; returns 0 if all fits, 1 if not."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.plan",
        description="Plan a run on accelerators that are not here. Exits with 0 if it fits into "
        "their memory, with 1 if not.",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="e.g. configs/mixer_l16_i21k.py")
    parser.add_argument(
        "--topology",
        metavar="CHIP:SIZE",
        help="e.g. v5e:8x8, v4:4x4x4, h100:16; chips: " + ", ".join(_chips()),
    )
    parser.add_argument("--slices", type=int, default=1, help="TPU slices of that size; default: 1")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="all",
        metavar="WHAT",
        help="try settings and rank those whose training step fits; all, or some of "
        "accumulation,fsdp,remat,unroll; the evaluation step is tried of the best alone",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile several times faster, to programs that are not quite those of a run",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument(
        "--tables",
        metavar="FOLDER",
        help="write the tables of docs/ there, compiling the rows that are not there yet or whose "
        "config file says something else by now; all of them take some 12 minutes on two cores",
    )
    parser.add_argument("--config.KEY", metavar="VALUE", dest="unused", help="change a key")
    known, overrides = parser.parse_known_args(arguments)
    if known.tables is not None:
        given = [
            f"--{name}"
            for name, value in vars(known).items()
            if name != "tables" and value != parser.get_default(name)
        ]
        if given or overrides:
            raise UserError(
                f"--tables says all that it plans; pass it without {' '.join(given + overrides)}"
            )
        _set_up()
        from mixer_jax.planning.tables import write_tables

        write_tables(Path(known.tables))
        return _FITS
    for flag in ("config", "topology"):
        if getattr(known, flag) is None:
            raise UserError(f"the following arguments are required: --{flag}; see --help")
    config = load_config_with_overrides(known.config, overrides)
    validate(config)
    from mixer_jax.planning.topology import parse_topology

    topology = parse_topology(known.topology, known.slices)
    _set_up()
    if known.sweep is not None:
        from mixer_jax.planning.sweep import format_ranking, ranking_to_dict, sweep

        results = sweep(config, topology, known.sweep, quick=known.quick)
        print(json.dumps(ranking_to_dict(results)) if known.json else format_ranking(results))
        return _FITS if results[0].fits else _TOO_LARGE
    from mixer_jax.planning.planner import make_plan
    from mixer_jax.planning.report import format_plan, plan_to_dict

    plan = make_plan(config, topology, quick=known.quick)
    print(json.dumps(plan_to_dict(plan)) if known.json else format_plan(plan))
    return _FITS if plan.fits else _TOO_LARGE


def _chips() -> list[str]:
    from mixer_jax.distributed.hardware import CHIPS

    return list(CHIPS)


def _set_up() -> None:
    """Prepares JAX, before it is imported, for compiling where there is no accelerator."""
    from mixer_jax.planning.topology import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    common.configure_jax(compilation_cache="")


if __name__ == "__main__":
    common.run_cli(main)
