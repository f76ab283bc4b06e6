"""Plan a run for accelerators that are not attached: memory fit, communication, time and cost.

    python -m mixer_jax.plan --config=configs/mixer_l16_i21k.py --topology=v5e:8x8
    python -m mixer_jax.plan --config=configs/mixer_h14_jft.py --topology=v4:4x4x4 --sweep

For TPUs, the real training and evaluation step are compiled by the TPU compiler, without a TPU. For
GPUs, all numbers are estimated by formula. No data is read.
"""

import json
import os
from collections.abc import Sequence

from mixer_jax.cli import common
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides

_FITS, _DOES_NOT_FIT = 0, 1


def main(argv: Sequence[str]) -> int:
    """Prints a plan; returns 0 if the run fits into memory and 1 if not."""
    args, overrides = _make_parser().parse_known_args(argv)
    config = parse(load_config_with_overrides(args.config, overrides))
    from mixer_jax.planning.topology import ENVIRONMENT, parse_topology

    topology = parse_topology(args.topology, args.slices)
    # Before JAX is imported.
    os.environ.update(ENVIRONMENT)
    common.configure_jax(compilation_cache="")
    if args.sweep is not None:
        from mixer_jax.planning.sweep import format_ranking, ranking_to_dict, sweep

        results = sweep(config, topology, args.sweep, fast_compile=args.quick)
        print(json.dumps(ranking_to_dict(results)) if args.json else format_ranking(results))
        return _FITS if results[0].fits else _DOES_NOT_FIT
    from mixer_jax.planning.planner import make_plan
    from mixer_jax.planning.report import format_plan, plan_to_dict

    plan = make_plan(config, topology, fast_compile=args.quick)
    print(json.dumps(plan_to_dict(plan)) if args.json else format_plan(plan))
    return _FITS if plan.fits else _DOES_NOT_FIT


def _make_parser() -> common.ArgumentParser:
    from mixer_jax.distributed.hardware import CHIPS

    parser = common.ArgumentParser(
        prog="python -m mixer_jax.plan",
        description="Plan a run for accelerators that are not attached. Exits with 0 if it fits "
        "into their memory and with 1 if not.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="config file, or the name of one in configs/, e.g. mixer_l16_i21k",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SIZE",
        help=f"e.g. v5e:8x8, v4:4x4x4, h100:16; chips: {', '.join(CHIPS)}",
    )
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices; default: 1")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="all",
        metavar="DIMENSIONS",
        help="try settings and rank those whose training step fits: all (default), or some of "
        "accumulation,fsdp,remat,unroll",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile several times faster, with fewer optimizations than a run",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, not a table")
    common.add_override_arg(parser, "override a key")
    return parser


if __name__ == "__main__":
    common.run_cli(main)
