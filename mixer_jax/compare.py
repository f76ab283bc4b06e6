"""Compare models on one dataset, as the paper does: `python -m mixer_jax.compare MODEL …`.

python -m mixer_jax.compare
python -m mixer_jax.compare configs/a.py configs/b.py --seeds=0,1,2 --equal_flops
python -m mixer_jax.compare Mixer-B_16.npz ViT-B_16.npz --dataset=imagenet2012 --split=validation
python -m mixer_jax.compare Mixer-B/16 Mixer-L/16
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.comparison.models import ModelSource, folder_name, parse_models
from mixer_jax.comparison.plan import (
    EvalData,
    find_eval_data,
    make_entries,
    parse_variation,
)
from mixer_jax.comparison.table import FORMATS, format_table
from mixer_jax.config.loading import Overrides, parse_overrides
from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES
from mixer_jax.planning.topology import parse_topology
from mixer_jax.training.workdir import resolve_workdir

# Compared without arguments, in minutes on two CPU cores.
_DEFAULT_CONFIG = "compare_digits"
_DEFAULT_WORKDIR = f"runs/{_DEFAULT_CONFIG}"
_EPILOG = """models:
  a config file, or the name of one in configs/, e.g. digits or configs/digits.py:low: trained with
    every seed, and evaluated by its evaluation "test", or the first one of the head
  a checkpoint, as --checkpoint of evaluate: evaluated on the same split
  a full name, such as Mixer-B/16: parameters, FLOPs, throughput and the paper's results
Each may have a label for tables and pictures: LABEL=MODEL.

Completed runs and measurements are kept in the workdir: rerun the same command to resume after a
stop or kill, or to print the same table. Further models and seeds can be added.
--config.KEY=VALUE overrides a config key in every config, as in mixer_jax.main."""


def main(argv: Sequence[str]) -> int:
    """Compares the models named on the command line; returns the exit code."""
    parser = _make_parser()
    args, rest = parser.parse_known_args(argv)
    # Positional arguments after an unknown option are left over.
    names = [*args.models, *(word for word in rest if not word.startswith("-"))]
    overrides = parse_overrides([word for word in rest if word.startswith("-")], vars(args))
    models = parse_models(names or _default_models())
    if not any(model.kind == "config" for model in models):
        _check_no_config_args(args, overrides)
    if args.topology is not None:
        parse_topology(args.topology)
    variation = None if args.vary is None else parse_variation(args.vary)
    seeds = None if args.seeds is None else common.parse_seeds(args.seeds)
    entries = make_entries(models, overrides, variation)
    data = find_eval_data(entries)
    _check_checkpoint_args(args, models)
    if data is None and args.dataset:
        data = EvalData(args.dataset, args.split or "test")
    for model in models:
        if model.kind == "checkpoint":
            resolve_checkpoint(model.source)
    config = next((entry.config for entry in entries if entry.config), None)
    cache = config.compilation_cache if config else FIELDS["compilation_cache"].default

    # JAX is imported only after the arguments are valid.
    common.configure_jax(cache)
    from mixer_jax.comparison.run import ComparisonRequest, run_comparison

    workdir = args.workdir or (_default_workdir(models) if names else _DEFAULT_WORKDIR)
    request = ComparisonRequest(
        entries=entries,
        workdir=resolve_workdir(workdir),
        seeds=seeds,
        variation=variation,
        data=data,
        data_dir=args.data_dir,
        image_size=args.image_size,
        equal_flops=args.equal_flops,
        topology=args.topology or "",
        dry_run=args.dry_run,
        keep_checkpoints=args.keep_checkpoints,
        throughput=args.throughput,
    )
    # Progress goes to standard error, so that standard output is the table.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run_comparison(request, lambda text: print(text, flush=True))
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    if outcome.table is None:
        print(outcome.text, end="", flush=True)
        return 0
    print(format_table(outcome.table, args.format), end="", flush=True)
    return 1 if any(row.failed for row in outcome.table.rows) else 0


def _make_parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.compare",
        description="Compare models on one dataset: accuracy, throughput, FLOPs, parameters and "
        "training cost, next to the paper's results. Without arguments, small models of all "
        "families are trained on handwritten digits with equal FLOPs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="config, checkpoint or full name, see below")
    common.add_workdir_arg(parser, "runs/compare_MODEL_MODEL…")
    add("--seeds", metavar="SEED,SEED,…", help="train every config with these seeds, e.g. 0,1,2")
    add(
        "--equal_flops",
        action="store_true",
        help="scale the steps and the warmup of every config to the training FLOPs of the first",
    )
    add(
        "--vary",
        metavar="KEY=VALUE,VALUE,…",
        help="train every config with each value of a key, e.g. "
        "dataset.train_split=train[:10%%],train; the picture has these on its x axis",
    )
    add("--dry_run", action="store_true", help="print the runs and their cost, and exit")
    add("--format", choices=FORMATS, default="text", help="format of the table; default: text")
    add(
        "--topology",
        metavar="CHIP:SIZE",
        help="also predict the core-days of training on this topology, as mixer_jax.plan, e.g. "
        "v3:4x4",
    )
    add("--no_throughput", dest="throughput", action="store_false", help="do not measure images/s")
    add("--keep_checkpoints", action="store_true", help="keep checkpoints of completed runs")
    few = parser.add_argument_group("options for checkpoints and full names")
    few.add_argument("--dataset", help="evaluation data; default: that of the configs or workdirs")
    few.add_argument("--split", default="", help="evaluation split; default: test")
    few.add_argument("--data_dir", default="", help="TFDS data directory; default: TFDS's own")
    few.add_argument(
        "--image_size",
        type=common.parse_image_size,
        metavar="SIDE or HEIGHTxWIDTH",
        help="in pixels; default: that of the checkpoint, or 224",
    )
    common.add_override_arg(parser, "override a key of every config")
    return parser


def _default_models() -> list[str]:
    return [f"{name}={_DEFAULT_CONFIG}:{name}" for name in FAMILIES]


def _check_no_config_args(args: argparse.Namespace, overrides: Overrides) -> None:
    """Raises UserError if an argument that applies to configs is set."""
    options = ("seeds", "vary", "topology")
    flags = [f"--{name}" for name in options if getattr(args, name) is not None]
    flags += [f"--{name}" for name in ("equal_flops", "keep_checkpoints") if getattr(args, name)]
    flags += [f"--config.{key}" for key, _ in overrides]
    if flags:
        raise UserError(f"{flags[0]} applies to configs, and no config is compared. Remove it.")


def _check_checkpoint_args(args: argparse.Namespace, models: Sequence[ModelSource]) -> None:
    """Raises UserError if an argument has no effect on these models."""
    kinds = {model.kind for model in models}
    if "config" in kinds:
        for name in ("dataset", "split"):
            if getattr(args, name):
                raise UserError(
                    f"--{name} must be left out if configs are compared, which name their data. "
                    "Override config.dataset or config.evals instead."
                )
    if args.split and not args.dataset:
        raise UserError("--split needs --dataset, e.g. --dataset=imagenet2012.")
    if kinds == {"config"} and args.image_size:
        raise UserError("--image_size must be left out for configs. Pass --config.image_size.")
    if "checkpoint" not in kinds and args.dataset:
        raise UserError("--dataset applies to checkpoints, and none is compared. Remove it.")


def _default_workdir(models: Sequence[ModelSource]) -> str:
    """Returns a workdir named after the models."""
    name = "_".join(folder_name(model.label) for model in models)
    return re.sub("_+", "_", f"runs/compare_{name}")


if __name__ == "__main__":
    common.run_cli(main, needs_output=False)
