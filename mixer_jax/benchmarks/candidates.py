"""Workloads, the candidates that run them, and their arguments. Does not import JAX."""

import argparse
import dataclasses
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixer_jax.cli.common import check_positive
from mixer_jax.config.schema import ARCHITECTURE_FIELDS, FIELDS, Field, OptimizerConfig
from mixer_jax.errors import UserError
from mixer_jax.models.execution import check_backend
from mixer_jax.models.registry import DEFAULT_FAMILY, get_family

# Frameworks, each measured in a process of its own.
JAX, TORCH = "jax", "torch"
# Family that is measured.
FAMILY = get_family(DEFAULT_FAMILY)
# Implementations of a Mixer.
MIXER_JAX, REFERENCE, TIMM, TIMM_COMPILED = "mixer_jax", "reference", "timm", "timm, torch.compile"

# Optimizer of every candidate: Adam with decoupled weight decay of kernels and gradient clipping.
# Without warmup, parameters change from the first step on.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=0,
    decay_type="none",
    weight_decay=0.1,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    clip_norm=1.0,
)

_AUTO, _NONE = "auto", "none"
# Keys of the config's model section whose values can be compared.
_EXCLUDED = {"family", "variant", "dtype"} | ARCHITECTURE_FIELDS.keys()
_SETTINGS: dict[str, Field] = {
    name: field
    for path, field in FIELDS.items()
    if path.startswith("model.") and (name := path.removeprefix("model.")) not in _EXCLUDED
}
# Settings with a short flag and a default.
_SHORT_FLAGS = {
    "scan_unroll": "blocks per iteration of the scan, e.g. 1,12; 0: no scan; -1: auto",
    "remat": "rematerialization policies, e.g. none,dots,mlp_hidden,full",
}
# Names of values of settings.
_VALUE_NAMES = {("scan_unroll", 0): "all", ("scan_unroll", -1): "auto"}


class Workload(NamedTuple):
    """Work that every candidate of a comparison does.

    Attributes:
        mode: "train", a training step, or "infer", from images to logits.
        variant: Variant of `FAMILY`.
        image_size: Side of the square images, in pixels.
        dtype: "float32", "bfloat16", or "auto" until the device is known.
        batch_size: Images per step; 0 until it is chosen.
    """

    mode: str
    variant: str
    image_size: int
    num_classes: int
    dtype: str
    batch_size: int

    @property
    def flops(self) -> int:
        """Model FLOPs per step: one forward pass per image, or three of them in training."""
        config = FAMILY.get_config(self.variant)
        forward = FAMILY.forward_flops(config, self.image_size, self.num_classes)
        return forward * self.batch_size * (3 if self.mode == "train" else 1)

    def format(self) -> str:
        """Formats everything but the mode."""
        return (
            f"{FAMILY.full_name(self.variant)}, {self.image_size} px, "
            f"{self.num_classes:,} classes, {self.batch_size} images per step, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of a Mixer with one choice of settings.

    Attributes:
        implementation: `MIXER_JAX`, `REFERENCE`, `TIMM` or `TIMM_COMPILED`.
        overrides: Values of keys of the config's model section; for `MIXER_JAX` only.
    """

    name: str
    implementation: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def framework(self) -> str:
        """Framework that runs the candidate."""
        return TORCH if self.implementation in (TIMM, TIMM_COMPILED) else JAX


def our_candidates(choices: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """Builds a candidate of mixer_jax for every combination of settings.

    A name lists the settings in which the candidates differ.
    """
    varied = {name for name, values in choices.items() if len(values) > 1}
    candidates = []
    for values in itertools.product(*choices.values()):
        overrides = dict(zip(choices, values, strict=True))
        shown = set(varied)
        # remat=auto means different policies with and without a scan.
        if "scan_unroll" in varied and overrides.get("remat") == "auto":
            shown.add("remat")
        settings = [
            f"{name}={_VALUE_NAMES.get((name, value), value)}"
            for name, value in overrides.items()
            if name in shown
        ]
        candidates.append(Candidate(", ".join([MIXER_JAX, *settings]), MIXER_JAX, overrides))
    return candidates


def check_backends(candidates: Sequence[Candidate], platform: str) -> None:
    """Raises UserError unless all backends run on a platform, as JAX names it."""
    for candidate in candidates:
        check_backend(candidate.overrides.get("backend", "auto"), platform, FAMILY.block_backends)


def add_workload_args(parser: argparse.ArgumentParser) -> None:
    """Adds the workload without its batch size, and the settings of mixer_jax to compare."""
    parser.add_argument(
        "--variant", default="B/16", choices=list(FAMILY.variants), help="default: B/16"
    )
    parser.add_argument("--image_size", type=int, default=224, help="in pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--dtype", default=_AUTO, choices=FIELDS["model.dtype"].choices)
    for name, field in _SETTINGS.items():
        default, text = None, f"list of values to compare; {field.help}"
        if name in _SHORT_FLAGS:
            default = str(field.default)
            text = f"list of {_SHORT_FLAGS[name]}; default: {default}"
        parser.add_argument(_flag(name), default=default, metavar="LIST", help=text)


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
    for name, field in _SETTINGS.items():
        flag = _flag(name)
        text = getattr(args, flag.removeprefix("--"))
        if text is not None:
            choices[name] = [field.parse(flag, part) for part in text.split(",")]
            for value in choices[name]:
                field.check(flag, value)
            _check_distinct(flag, text, choices[name])
    num_blocks = FAMILY.num_blocks(FAMILY.get_config(args.variant))
    if (largest := max(choices["scan_unroll"])) > num_blocks:
        raise UserError(
            f"--scan_unroll must be a list of numbers from -1 to {num_blocks}, got {largest}."
        )
    # 0 unrolls all blocks.
    unrolled = [value or num_blocks for value in choices["scan_unroll"]]
    _check_distinct("--scan_unroll", args.scan_unroll, unrolled)
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


def _flag(name: str) -> str:
    return f"--{name}" if name in _SHORT_FLAGS else f"--model.{name}"


def _check_distinct(flag: str, text: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"{flag} must list each value once, got {text}.")
