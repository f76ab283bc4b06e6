"""Evaluate a checkpoint by transfer: `python -m mixer_jax.transfer --checkpoint=… --suite=…`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mixer_jax.checkpoints.resolve import (
    FORMATS,
    HUB_FILES,
    RUN,
    CheckpointRef,
    is_checkpoint_path,
    resolve_checkpoint,
)
from mixer_jax.cli import common
from mixer_jax.config.loading import Overrides, exec_config_file, parse_overrides
from mixer_jax.config.schema import EVAL_FIELDS, parse_shots
from mixer_jax.errors import UserError, suggest
from mixer_jax.suites.builtin import SUITES, few_shot_suite
from mixer_jax.suites.paper_results import PRETRAIN_DATASETS
from mixer_jax.suites.plan import check_overrides, check_task_overrides, default_config
from mixer_jax.suites.tasks import AUTO, METHODS, NATIVE, Suite, check_suite
from mixer_jax.training.workdir import resolve_workdir

_FEW_SHOT = "few_shot"
_EPILOG = f"""suites:
{chr(10).join(f"  {name:<10} {suite.title}" for name, suite in SUITES.items())}
  few_shot   probes on the dataset of --dataset
  FILE.py    a custom suite: a file with SUITE = Suite(...); see mixer_jax.suites.tasks

Completed runs are skipped: rerun the same command to resume after a stop or kill.
--config.KEY=VALUE overrides a config key in every fine-tuning run, as in mixer_jax.main, e.g.
--config.recipe.grad_accum_steps=8. The table lists overrides that differ from the protocol."""


def main(argv: Sequence[str]) -> int:
    """Runs the suite named on the command line; returns the exit code."""
    args, overrides = _parse_args(argv)
    if args.report:
        _check_report_args(args, argv)
        common.configure_jax("")
        from mixer_jax.suites.table import report

        report(resolve_workdir(args.workdir))
        return 0
    if not args.checkpoint or not args.suite:
        raise UserError("Pass --checkpoint and --suite, or --report with --workdir.")
    suite = _load_suite(args)
    check_suite(suite)
    check_task_overrides(suite)
    check_overrides(overrides)
    checkpoint = resolve_checkpoint(args.checkpoint, args.step)

    # JAX is imported only after the arguments are valid.
    common.configure_jax(default_config(overrides).compilation_cache)
    from mixer_jax.distributed.multihost import propagate_failure
    from mixer_jax.suites.run import TransferRequest, run_suite

    request = TransferRequest(
        suite=suite,
        checkpoint=checkpoint,
        workdir=resolve_workdir(args.workdir or _default_workdir(checkpoint, args)),
        overrides=overrides,
        image_size=args.image_size,
        data_dir=args.data_dir,
        tasks=args.tasks,
        shard=args.shard,
        dry_run=args.dry_run,
        keep_checkpoints=args.keep_checkpoints,
        throughput=args.throughput,
        pretrain_dataset=args.pretrain_dataset,
    )
    with propagate_failure():
        outcome = run_suite(request)
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    return 1 if outcome.failures else 0


def _parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.transfer",
        description="Fine-tune and probe a checkpoint on a suite of tasks with the paper's "
        "protocol, and print a table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="CHECKPOINT", help=common.CHECKPOINT_HELP)
    common.add_step_arg(parser)
    add("--suite", metavar="NAME or FILE.py", help=f"{', '.join(SUITES)}, {_FEW_SHOT}, or a file")
    common.add_workdir_arg(parser, "runs/CHECKPOINT_SUITE")
    add(
        "--image_size",
        type=_parse_image_size,
        default=NATIVE,
        help="native: the checkpoint's size; auto: that size for images under 96 x 96 px, and "
        "twice that for larger ones; or a number of pixels; default: native",
    )
    add("--data_dir", default="", help="TFDS data directory; default: TFDS's own")
    add("--tasks", type=_parse_names, default=(), help="run only these tasks, e.g. cifar10,pets")
    add("--shard", type=_parse_shard, default=(1, 1), metavar="I/N", help="run only shard I of N")
    add("--dry_run", action="store_true", help="print the runs and missing data, and exit")
    add("--report", action="store_true", help="print and write the table of --workdir; run nothing")
    add("--keep_checkpoints", action="store_true", help="keep checkpoints of completed runs")
    add("--no_throughput", dest="throughput", action="store_false", help="do not measure images/s")
    add(
        "--pretrain_dataset",
        choices=[*PRETRAIN_DATASETS, "none"],
        default="",
        help="pre-training data of the checkpoint; default: inferred",
    )
    few = parser.add_argument_group("options for --suite=few_shot")
    few.add_argument("--dataset", help=common.DATASET_HELP)
    few.add_argument("--train_split", default="train", help="default: train")
    few.add_argument(
        "--test_split", default="", help="default: validation for ImageNet, otherwise test"
    )
    few.add_argument(
        "--shots",
        default=EVAL_FIELDS["shots"].default,
        help="images per class; default: 1,5,10,25",
    )
    few.add_argument(
        "--probes",
        type=_parse_names,
        default=(_FEW_SHOT,),
        help=f"among {','.join(METHODS)}; default: {_FEW_SHOT}",
    )
    args, rest = parser.parse_known_args(argv)
    args.shots = tuple(sorted(parse_shots("--shots", args.shots)))
    return args, parse_overrides(rest)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _parse_image_size(text: str) -> str:
    if text not in (NATIVE, AUTO) and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"must be {NATIVE}, {AUTO} or a number of pixels, got {text!r}."
        )
    return text


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"must be I/N with I from 1 to N, got {text!r}. Pass e.g. 1/4."
        )
    return int(index), int(count)


def _check_report_args(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Raises UserError unless --report comes with --workdir and nothing else."""
    if not args.workdir:
        raise UserError("--report needs --workdir, the workdir of a suite.")
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    others = [flag for flag in flags if flag not in ("--report", "--workdir")]
    if others:
        raise UserError(f"--report takes only --workdir. Remove {', '.join(others)}.")


def _load_suite(args: argparse.Namespace) -> Suite:
    """Returns the suite of --suite.

    Raises:
        UserError: No such suite exists, or an argument is missing or has no effect.
    """
    if args.suite == _FEW_SHOT:
        if not args.dataset:
            raise UserError("--suite=few_shot needs --dataset, e.g. --dataset=imagenet2012.")
        for method in args.probes:
            if method not in METHODS:
                raise UserError(f"--probes must be among {', '.join(METHODS)}, got {method!r}.")
        default_split = "validation" if args.dataset.startswith("imagenet2012") else "test"
        test_split = args.test_split or default_split
        return few_shot_suite(args.dataset, args.train_split, test_split, args.shots, args.probes)
    if args.dataset:
        raise UserError(
            "--dataset is only for --suite=few_shot; other suites define their datasets."
        )
    if args.suite.endswith(".py"):
        suite = exec_config_file(Path(args.suite), lambda module: module.SUITE, "suite")
        if not isinstance(suite, Suite):
            raise UserError(
                f"SUITE in {args.suite!r} must be a mixer_jax.suites.tasks.Suite, got {suite!r}."
            )
        return suite
    if args.suite not in SUITES:
        names = ", ".join([*SUITES, _FEW_SHOT])
        raise UserError(
            f"--suite must be one of {names}, or a .py file, got {args.suite!r}."
            f"{suggest(args.suite, [*SUITES, _FEW_SHOT])}"
        )
    return SUITES[args.suite]


def _default_workdir(checkpoint: CheckpointRef, args: argparse.Namespace) -> str:
    """Returns a workdir named after checkpoint, step, suite and dataset."""
    path = Path(checkpoint.path)
    if checkpoint.format == "hub":
        name = checkpoint.path.partition("/")[2]
    elif path.name in HUB_FILES:
        # All of them have this name, so that the folder identifies the model.
        name = path.parent.name
    else:
        suffixes = [suffix for suffix in FORMATS if path.name.endswith(suffix)]
        is_file = checkpoint.format != RUN and suffixes
        name = path.name.removesuffix(suffixes[0]) if is_file else path.name
    parts = [name, Path(args.suite).stem]
    given = Path(args.checkpoint)
    if args.step is not None or is_checkpoint_path(given):
        parts.insert(1, str(checkpoint.step))
    if args.suite == _FEW_SHOT:
        parts.append(args.dataset)
    return "runs/" + "_".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts)


if __name__ == "__main__":
    common.run_cli(main, needs_output=False)
