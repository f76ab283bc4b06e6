"""Command-line arguments of the modes that measure models. Does not import JAX."""

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

from mixer_jax.benchmarks.candidates import (
    FAMILY,
    REFERENCE,
    TIMM,
    TIMM_COMPILED,
    Candidate,
    Workload,
    our_candidates,
)
from mixer_jax.cli.common import check_positive
from mixer_jax.config.schema import ARCHITECTURE_FIELDS, FIELDS, Field
from mixer_jax.errors import UserError

_AUTO, _NONE = "auto", "none"
# Settings that have flags of their own; their values can be compared, too.
_SHORT_FLAGS = {
    "scan_unroll": "blocks per iteration of the scan, e.g. 1,12; 0: no scan; -1: auto",
    "remat": "rematerialization policies, e.g. none,dots,mlp_hidden,full",
}
_EXCLUDED = {"family", "variant", "dtype"} | ARCHITECTURE_FIELDS.keys()


def add_workload_args(parser: argparse.ArgumentParser) -> None:
    """Adds the workload except its batch size, and the settings of mixer_jax to compare."""
    parser.add_argument(
        "--variant", default="B/16", choices=list(FAMILY.variants), help="default: B/16"
    )
    parser.add_argument("--image_size", type=int, default=224, help="in pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--dtype", default=_AUTO, choices=FIELDS["model.dtype"].choices)
    for name, field in _model_fields().items():
        if name in _SHORT_FLAGS:
            default = str(field.default)
            text = f"list of {_SHORT_FLAGS[name]}; default: {default}"
            parser.add_argument(f"--{name}", default=default, metavar="LIST", help=text)
        else:
            text = f"list of values to compare; {field.help}"
            parser.add_argument(f"--model.{name}", metavar="LIST", help=text)


def add_baselines_arg(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of baselines for modes that can measure programs of JAX only."""
    parser.add_argument(
        "--baselines", default=REFERENCE, choices=[REFERENCE, _NONE], help=f"default: {REFERENCE}"
    )


def parse_workload(args: argparse.Namespace, mode: str) -> Workload:
    """Parses the workload; its batch size is 0 for "auto".

    Raises:
        UserError: A value is out of range.
    """
    config = FAMILY.get_config(args.variant)
    FAMILY.check_image_size(config, args.image_size, args.image_size)
    check_positive(args, "num_classes")
    text = str(args.batch_size)
    if text != _AUTO and not (text.isdecimal() and int(text)):
        auto = f" or {_AUTO}" if isinstance(args.batch_size, str) else ""
        raise UserError(f"--batch_size must be a positive number{auto}, got {text}.")
    batch_size = 0 if text == _AUTO else int(text)
    return Workload(mode, args.variant, args.image_size, args.num_classes, args.dtype, batch_size)


def parse_candidates(args: argparse.Namespace, mode: str) -> list[Candidate]:
    """Parses the settings of mixer_jax into a candidate for every combination.

    Raises:
        UserError: A value is unknown, out of range or repeated.
    """
    choices: dict[str, list[Any]] = {}
    for name, field in _model_fields().items():
        flag = f"--{name}" if name in _SHORT_FLAGS else f"--model.{name}"
        text = getattr(args, flag.removeprefix("--"))
        if text is not None:
            choices[name] = _parse_list(flag, text, field)
    _check_scan_unroll(args, choices["scan_unroll"])
    if mode == "infer":
        # Without a backward pass, all rematerialization policies are the same program.
        choices["remat"] = choices["remat"][:1]
    return our_candidates(choices)


def parse_baselines(args: argparse.Namespace) -> list[Candidate]:
    """Parses --baselines; without it, all that are installed are measured.

    Raises:
        UserError: A baseline is unknown or not installed.
    """
    missing = missing_timm_package()
    if args.baselines is None:
        names = [REFERENCE] if missing else [REFERENCE, TIMM]
    elif args.baselines == _NONE:
        return []
    else:
        names = args.baselines.split(",")
        for name in names:
            if name not in (REFERENCE, TIMM):
                raise UserError(
                    f"--baselines must be {_NONE} or a list of {REFERENCE} and {TIMM}, "
                    f"got {name!r}."
                )
        _check_distinct("--baselines", args.baselines, names)
        if TIMM in names and missing:
            raise UserError(
                f"--baselines={args.baselines} needs {missing}, which is not installed. "
                f"Run pip install torch timm, or leave {TIMM} out."
            )
    if TIMM in names and not args.no_torch_compile:
        names.append(TIMM_COMPILED)
    return [Candidate(name, name) for name in names]


def missing_timm_package() -> str:
    """Returns the first package that timm needs and that is not installed, or ""."""
    return next((name for name in ("torch", "timm") if importlib.util.find_spec(name) is None), "")


def _model_fields() -> dict[str, Field]:
    """Returns the keys of the config's model section whose values can be compared."""
    fields = {
        path.removeprefix("model."): field
        for path, field in FIELDS.items()
        if path.startswith("model.")
    }
    return {name: field for name, field in fields.items() if name not in _EXCLUDED}


def _check_scan_unroll(args: argparse.Namespace, values: list[int]) -> None:
    num_blocks = FAMILY.num_blocks(FAMILY.get_config(args.variant))
    if max(values) > num_blocks:
        raise UserError(
            f"--scan_unroll must be a list of numbers from -1 to {num_blocks}, got {max(values)}."
        )
    # 0 unrolls all blocks.
    _check_distinct("--scan_unroll", args.scan_unroll, [value or num_blocks for value in values])


def _parse_list(flag: str, text: str, field: Field) -> list[Any]:
    values = [field.parse(flag, part) for part in text.split(",")]
    for value in values:
        field.check(flag, value)
    _check_distinct(flag, text, values)
    return values


def _check_distinct(flag: str, text: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"{flag} must list each value once, got {text}.")
