"""Judge a checkpoint by a suite: `python -m mixer_jax.transfer --checkpoint=… --suite=…`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mixer_jax import command_line
from mixer_jax.config_file import Overrides, read_overrides, run_file
from mixer_jax.errors import UserError
from mixer_jax.evaluation.paper import DATA
from mixer_jax.evaluation.suites import SUITES, few_shot_suite
from mixer_jax.evaluation.tasks import AUTO, METHODS, OWN, Suite, check_suite
from mixer_jax.keys import EVAL_KEYS
from mixer_jax.training import workdir as workdirs
from mixer_jax.transfers.runs import check_changes, check_overrides, default_config
from mixer_jax.weights.places import HUB_FILE, KINDS, RUN, Place, find_weights
from mixer_jax.weights.steps import FOLDER

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
    "pretrained_on",
)
_EPILOG = f"""suites:
{chr(10).join(f"  {name:<10} {suite.title}" for name, suite in SUITES.items())}
  few_shot   probes on the data set that --dataset names
  FILE.py    your own: a file with SUITE = Suite(...), made of mixer_jax.evaluation.tasks

What has ended is not done again: the same command goes on after it was stopped or killed.
--config.KEY=VALUE changes a key of every fine-tuning run, as of mixer_jax.main, e.g.
--config.recipe.accumulation_steps=8; the table then says so."""


def main(arguments: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code."""
    known, overrides = _parse(arguments)
    if known.report:
        _check_report(known, arguments)
        command_line.set_up_libraries("")
        from mixer_jax.transfers.report import report

        report(workdirs.absolute(known.workdir))
        return 0
    if not known.checkpoint or not known.suite:
        raise UserError("--checkpoint and --suite are needed, or --report with --workdir")
    suite = _find_suite(known)
    check_suite(suite)
    check_changes(suite)
    check_overrides(overrides)
    place = find_weights(known.checkpoint, known.step)

    # From here on the heavy libraries are needed.
    command_line.set_up_libraries(default_config(overrides).compilation_cache)
    from mixer_jax.parallel.endings import failing_together
    from mixer_jax.transfers.judging import Wish, judge

    wish = Wish(
        suite,
        place,
        workdirs.absolute(known.workdir or _default_workdir(place, known)),
        overrides,
        **{name: getattr(known, name) for name in _AS_THEY_ARE},
    )
    with failing_together():
        ended = judge(wish)
    if ended.stopped_by is not None:
        return 128 + ended.stopped_by
    return 1 if ended.failures else 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    parser = command_line.Parser(
        prog="python -m mixer_jax.transfer",
        description="Fine-tune and probe a checkpoint on a suite of tasks by the paper's protocol, "
        "and print the table.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="WEIGHTS", help=command_line.WEIGHTS_HELP)
    add("--step", type=int, help="which checkpoint of a run; default: the newest")
    add("--suite", metavar="NAME or FILE.py", help=f"{', '.join(SUITES)}, {_FEW_SHOT}, or a file")
    add("--workdir", help="folder or gs:// URL; default: runs/CHECKPOINT_SUITE…")
    add(
        "--image_size",
        type=_image_size,
        default=OWN,
        help="own: the checkpoint's; auto: that for images under 96 x 96 px, twice that for "
        "larger ones; or a side, pixels; default: own",
    )
    add("--data_dir", default="", help="where TFDS keeps data; default: TFDS's own")
    add("--tasks", type=_names, default=(), help="only these, e.g. cifar10,pets")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N shares")
    add("--dry_run", action="store_true", help="say what would be done, and what is missing")
    add("--report", action="store_true", help="only print the table of --workdir, and write it")
    add("--keep_checkpoints", action="store_true", help="of runs that have ended")
    add("--no_throughput", dest="throughput", action="store_false", help="do not measure images/s")
    add("--pretrained_on", choices=[*DATA, "none"], default="", help="default: as told")
    few = parser.add_argument_group("of --suite=few_shot")
    few.add_argument("--dataset", help="TFDS name or folder:PATH")
    few.add_argument("--train_split", default="train", help="default: train")
    few.add_argument("--test_split", default="", help="default: validation of ImageNet, else test")
    few.add_argument("--shots", type=_numbers, default=EVAL_KEYS["shots"].default)
    few.add_argument("--probes", type=_names, default=(_FEW_SHOT,), help="few_shot,linear,knn")
    known, rest = parser.parse_known_args(arguments)
    return known, read_overrides(rest)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of images a class; pass e.g. 1,5,10")
    return tuple(sorted({int(number) for number in numbers}))


def _image_size(text: str) -> str:
    if text not in (OWN, AUTO) and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {OWN}, {AUTO} and a number of pixels; pass one"
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
        suite = run_file(Path(known.suite), lambda module: module.SUITE, "suite")
        if not isinstance(suite, Suite):
            raise UserError(
                f"suite file {known.suite!r}: SUITE must be a Suite of evaluation.tasks"
            )
        return suite
    if known.suite not in SUITES:
        names = ", ".join([*SUITES, _FEW_SHOT])
        raise UserError(f"--suite={known.suite} is unknown; choose {names}, or name a .py file")
    return SUITES[known.suite]


def _default_workdir(place: Place, known: argparse.Namespace) -> str:
    """Returns the folder of a suite: the names of weights, step, suite and data set."""
    path = Path(place.path)
    if place.kind == "hub":
        name = place.path.partition("/")[2]
    elif path.name == HUB_FILE:
        # All are called so; their folder has the name.
        name = path.parent.name
    else:
        ends = [] if place.kind == RUN else [end for end in KINDS if path.name.endswith(end)]
        name = path.name.removesuffix(ends[0]) if ends else path.name
    parts = [name, Path(known.suite).stem]
    asked = Path(known.checkpoint)
    if known.step is not None or (asked.parent.name == FOLDER and asked.name.isdecimal()):
        parts.insert(1, str(place.step))
    if known.suite == _FEW_SHOT:
        parts.append(known.dataset)
    return "runs/" + "_".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts)


if __name__ == "__main__":
    command_line.run(main, needs_output=False)
