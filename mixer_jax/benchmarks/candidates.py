"""Workloads, the candidates that run them, and their arguments. Does not import JAX."""

import argparse
import dataclasses
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixer_jax.cli.common import check_positive
from mixer_jax.config.schema import ARCHITECTURE_FIELDS, FIELDS, Field, OptimizerConfig
from mixer_jax.errors import UserError, missing_library_error
from mixer_jax.models.execution import check_backend
from mixer_jax.models.family import CUSTOM, ModelFamily
from mixer_jax.models.registry import get_family, list_model_names, parse_model_name

# Frameworks, each measured in a process of its own.
JAX, TORCH = "jax", "torch"
# Implementations of a model.
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
        model: Full name of the model, e.g. "ViT-B/16".
        image_size: Side of the square images, in pixels.
        dtype: "float32", "bfloat16", or "auto" until the device is known.
        batch_size: Images per step; 0 until it is chosen.
    """

    mode: str
    model: str
    image_size: int
    num_classes: int
    dtype: str
    batch_size: int

    @property
    def family(self) -> ModelFamily:
        """Family of the model."""
        return get_family(parse_model_name(self.model)[0])

    @property
    def variant(self) -> str:
        """Name of the model in its family."""
        return parse_model_name(self.model)[1]

    @property
    def config(self) -> Any:
        """Architecture config of the model."""
        return self.family.get_config(self.variant)

    @property
    def flops(self) -> int:
        """Model FLOPs per step: one forward pass per image, or three of them in training."""
        forward = self.family.forward_flops(self.config, self.image_size, self.num_classes)
        return forward * self.batch_size * (3 if self.mode == "train" else 1)

    def format(self) -> str:
        """Formats everything but the mode."""
        return (
            f"{self.model}, {self.image_size} px, "
            f"{self.num_classes:,} classes, {self.batch_size} images per step, {self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of a model with one choice of settings.

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


def check_backends(workload: Workload, candidates: Sequence[Candidate], platform: str) -> None:
    """Raises UserError unless the model has all backends, and they run on a platform."""
    backends = workload.family.block_backends
    for candidate in candidates:
        check_backend(candidate.overrides.get("backend", "auto"), platform, backends)


def add_workload_args(parser: argparse.ArgumentParser) -> None:
    """Adds the workload without its batch size, and the settings of mixer_jax to compare."""
    add_model_arg(parser, "B/16")
    parser.add_argument("--image_size", type=int, default=224, help="in pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--dtype", default=_AUTO, choices=FIELDS["model.dtype"].choices)
    for name, field in _SETTINGS.items():
        default, text = None, f"list of values to compare; {field.help}"
        if name in _SHORT_FLAGS:
            default = str(field.default)
            text = f"list of {_SHORT_FLAGS[name]}; default: {default}"
        parser.add_argument(_flag(name), default=default, metavar="LIST", help=text)


def add_model_arg(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the name of the model."""
    parser.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help=f"{', '.join(list_model_names())}; without a family, a Mixer; default: {default}",
    )


def add_baselines_arg(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of baselines for modes that can measure programs of JAX only."""
    text = f"default: {REFERENCE}, if the family has one"
    parser.add_argument("--baselines", choices=[REFERENCE, _NONE], help=text)


def parse_workload(args: argparse.Namespace, mode: str) -> Workload:
    """Parses the workload; its batch size is 0 for "auto".

    Raises:
        UserError: A value is out of range.
    """
    model = parse_model(args)
    check_positive(args, "num_classes")
    text = str(args.batch_size)
    if text != _AUTO and not (text.isdecimal() and int(text)):
        auto = f" or {_AUTO}" if isinstance(args.batch_size, str) else ""
        raise UserError(f"--batch_size must be a positive number{auto}, got {text}.")
    batch_size = 0 if text == _AUTO else int(text)
    sizes = (args.image_size, args.num_classes)
    workload = Workload(mode, model, *sizes, args.dtype, batch_size)
    workload.family.check_image_size(workload.config, args.image_size, args.image_size)
    return workload


def parse_model(args: argparse.Namespace) -> str:
    """Returns the full name of the model that --model names.

    Raises:
        UserError: No such model exists.
    """
    family_name, variant = parse_model_name(args.model)
    if variant == CUSTOM:
        raise UserError(f"--model must name a variant, got {args.model!r}.")
    return get_family(family_name).full_name(variant)


def parse_candidates(args: argparse.Namespace, workload: Workload) -> list[Candidate]:
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
    num_blocks = workload.family.num_blocks(workload.config)
    if (largest := max(choices["scan_unroll"])) > num_blocks:
        raise UserError(
            f"--scan_unroll must be at most {num_blocks}, the number of blocks that "
            f"{workload.model} can scan, got {largest}. 0: no scan; -1: auto."
        )
    # 0 unrolls all blocks.
    unrolled = [value or num_blocks for value in choices["scan_unroll"]]
    _check_distinct("--scan_unroll", args.scan_unroll, unrolled)
    if workload.mode == "infer":
        # Without a backward pass, all rematerialization policies are the same program.
        choices["remat"] = choices["remat"][:1]
    return our_candidates(choices)


def parse_baselines(
    args: argparse.Namespace, workload: Workload, *, with_timm: bool = False
) -> list[Candidate]:
    """Parses --baselines; without it, all that exist and are installed are measured.

    Args:
        args: Arguments.
        workload: Workload, whose family may have no reference.
        with_timm: Whether the mode can measure timm.

    Raises:
        UserError: A baseline is unknown or not installed, or the family has no reference.
    """
    missing = missing_timm_package()
    has_reference = find_reference(workload.family) is not None
    if args.baselines is None:
        names = [REFERENCE] if has_reference else []
        if with_timm and not missing:
            names.append(TIMM)
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
        if REFERENCE in names and not has_reference:
            raise UserError(
                f"--baselines={args.baselines} needs a plain implementation of "
                f"{workload.family.display_name}, which mixer_jax does not have. "
                f"Leave {REFERENCE} out."
            )
        if TIMM in names and missing:
            raise missing_library_error(
                f"--baselines={args.baselines}", missing, f"torch timm, or leave {TIMM} out"
            )
    if TIMM in names and not args.no_torch_compile:
        names.append(TIMM_COMPILED)
    return [Candidate(name, name) for name in names]


def find_reference(family: ModelFamily) -> str | None:
    """Returns the module with a family's plain implementation; None if there is none."""
    module = f"mixer_jax.benchmarks.reference_{family.name}"
    return module if importlib.util.find_spec(module) else None


def missing_timm_package() -> str:
    """Returns the first package that timm needs and that is not installed, or ""."""
    return next((name for name in ("torch", "timm") if importlib.util.find_spec(name) is None), "")


def _flag(name: str) -> str:
    return f"--{name}" if name in _SHORT_FLAGS else f"--model.{name}"


def _check_distinct(flag: str, text: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"{flag} must list each value once, got {text}.")
