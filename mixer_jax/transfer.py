"""Judge a checkpoint by a suite: `python -m mixer_jax.transfer --checkpoint=… --suite=…`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mixer_jax.checkpoints.resolve import (
    CHECKPOINT_DIR,
    FORMATS,
    HUB_FILE,
    RUN,
    CheckpointRef,
    resolve_checkpoint,
)
from mixer_jax.cli import common
from mixer_jax.config.loading import Overrides, exec_config_file, parse_overrides
from mixer_jax.config.schema import EVAL_FIELDS
from mixer_jax.errors import UserError
from mixer_jax.suites.builtin import SUITES, few_shot_suite
from mixer_jax.suites.paper_results import DATA
from mixer_jax.suites.run_configs import check_overrides, check_task_overrides, default_config
from mixer_jax.suites.tasks import AUTO, METHODS, NATIVE, Suite, check_suite
from mixer_jax.training import workdir as workdirs

_FEW_SHOT = "few_shot"
# Arguments that judging takes under their own names.
_AS_THEY_ARE = (
    "image_size",
    "data_dir",
    "tasks",
    "shard",
    "dry_run",
    "keep_checkpoints",
    "throughput",
    "pretrain_dataset",
)
_EPILOG = f"""suites:
{chr(10).join(f"  {name:<10} {suite.title}" for name, suite in SUITES.items())}
  few_shot   probes on the data set that --dataset names
  FILE.py    your own: a file with SUITE = Suite(...), made of mixer_jax.suites.tasks

What has ended is not done again: the same command goes on after it was stopped or killed.
--config.KEY=VALUE changes a key of every fine-tuning run, as of mixer_jax.main, e.g.
--config.recipe.grad_accum_steps=8; the table then says so."""


def main(arguments: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code."""
    known, overrides = _parse(arguments)
    if known.report:
        _check_report(known, arguments)
        common.configure_jax("")
        from mixer_jax.suites.report import report

        report(workdirs.resolve_workdir(known.workdir))
        return 0
    if not known.checkpoint or not known.suite:
        raise UserError("--checkpoint and --suite are needed, or --report with --workdir")
    suite = _find_suite(known)
    check_suite(suite)
    check_task_overrides(suite)
    check_overrides(overrides)
    place = resolve_checkpoint(known.checkpoint, known.step)

    # From here on the heavy libraries are needed.
    common.configure_jax(default_config(overrides).compilation_cache)
    from mixer_jax.distributed.multihost import propagate_failure
    from mixer_jax.suites.run import TransferRequest, run_suite

    wish = TransferRequest(
        suite,
        place,
        workdirs.resolve_workdir(known.workdir or _default_workdir(place, known)),
        overrides,
        **{name: getattr(known, name) for name in _AS_THEY_ARE},
    )
    with propagate_failure():
        ended = run_suite(wish)
    if ended.stopped_by is not None:
        return 128 + ended.stopped_by
    return 1 if ended.failures else 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.transfer",
        description="Fine-tune and probe a checkpoint on a suite of tasks by the paper's protocol, "
        "and print the table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="WEIGHTS", help=common.CHECKPOINT_HELP)
    add("--step", type=int, help="which checkpoint of a run; default: the newest")
    add("--suite", metavar="NAME or FILE.py", help=f"{', '.join(SUITES)}, {_FEW_SHOT}, or a file")
    add("--workdir", help="folder or gs:// URL; default: runs/CHECKPOINT_SUITE…")
    add(
        "--image_size",
        type=_image_size,
        default=NATIVE,
        help="native: the checkpoint's; auto: that for images under 96 x 96 px, twice that for "
        "larger ones; or a side, pixels; default: native",
    )
    add("--data_dir", default="", help="where TFDS keeps data; default: TFDS's own")
    add("--tasks", type=_names, default=(), help="only these, e.g. cifar10,pets")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N shares")
    add("--dry_run", action="store_true", help="say what would be done, and what is missing")
    add("--report", action="store_true", help="only print the table of --workdir, and write it")
    add("--keep_checkpoints", action="store_true", help="of runs that have ended")
    add("--no_throughput", dest="throughput", action="store_false", help="do not measure images/s")
    add("--pretrain_dataset", choices=[*DATA, "none"], default="", help="default: as told")
    few = parser.add_argument_group("of --suite=few_shot")
    few.add_argument("--dataset", help="TFDS name or folder:PATH")
    few.add_argument("--train_split", default="train", help="default: train")
    few.add_argument("--test_split", default="", help="default: validation of ImageNet, else test")
    few.add_argument("--shots", type=_numbers, default=EVAL_FIELDS["shots"].default)
    few.add_argument("--probes", type=_names, default=(_FEW_SHOT,), help="few_shot,linear,knn")
    known, rest = parser.parse_known_args(arguments)
    return known, parse_overrides(rest)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of images a class; pass e.g. 1,5,10")
    return tuple(sorted({int(number) for number in numbers}))


def _image_size(text: str) -> str:
    if text not in (NATIVE, AUTO) and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {NATIVE}, {AUTO} and a number of pixels; pass one"
        )
    return text


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; pass 1/4, 2/4, 3/4 and 4/4")
    return int(number), int(count)


def _check_report(known: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Raises UserError unless --report comes with --workdir and with nothing else."""
    if not known.workdir:
        raise UserError("--report needs --workdir, the folder of a suite")
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    others = [flag for flag in flags if flag not in ("--report", "--workdir")]
    if others:
        raise UserError(f"--report takes only --workdir; leave out {', '.join(others)}")


def _find_suite(known: argparse.Namespace) -> Suite:
    """Returns the suite that --suite names.

    Raises:
        UserError: there is none, or an argument that it needs lacks or has no say.
    """
    if known.suite == _FEW_SHOT:
        if not known.dataset:
            raise UserError("--suite=few_shot needs --dataset, e.g. --dataset=imagenet2012")
        for method in known.probes:
            if method not in METHODS:
                raise UserError(f"--probes names {method!r}; choose among {', '.join(METHODS)}")
        usual = "validation" if known.dataset.startswith("imagenet2012") else "test"
        test_split = known.test_split or usual
        return few_shot_suite(
            known.dataset, known.train_split, test_split, known.shots, known.probes
        )
    if known.dataset:
        raise UserError("--dataset is for --suite=few_shot; a suite names its own data sets")
    if known.suite.endswith(".py"):
        suite = exec_config_file(Path(known.suite), lambda module: module.SUITE, "suite")
        if not isinstance(suite, Suite):
            raise UserError(
                f"suite file {known.suite!r}: SUITE must be a Suite of evaluation.tasks"
            )
        return suite
    if known.suite not in SUITES:
        names = ", ".join([*SUITES, _FEW_SHOT])
        raise UserError(f"--suite={known.suite} is unknown; choose {names}, or name a .py file")
    return SUITES[known.suite]


def _default_workdir(place: CheckpointRef, known: argparse.Namespace) -> str:
    """Returns the folder of a suite: the names of weights, step, suite and data set."""
    path = Path(place.path)
    if place.format == "hub":
        name = place.path.partition("/")[2]
    elif path.name == HUB_FILE:
        # All are called so; their folder has the name.
        name = path.parent.name
    else:
        ends = [] if place.format == RUN else [end for end in FORMATS if path.name.endswith(end)]
        name = path.name.removesuffix(ends[0]) if ends else path.name
    parts = [name, Path(known.suite).stem]
    asked = Path(known.checkpoint)
    if known.step is not None or (asked.parent.name == CHECKPOINT_DIR and asked.name.isdecimal()):
        parts.insert(1, str(place.step))
    if known.suite == _FEW_SHOT:
        parts.append(known.dataset)
    return "runs/" + "_".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts)


if __name__ == "__main__":
    common.run_cli(main, needs_output=False)
