"""Who is measured, at what: ours, and the peers that do the same work."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixer_jax.config.schema import FIELDS
from mixer_jax.errors import UserError

OURS, REFERENCE, EAGER, COMPILED = "mixer_jax", "reference", "timm", "timm, torch.compile"

# What every contestant trains with: Adam with decoupled decay of kernels, gradients clipped.
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.1, 1.0
B1, B2, EPS = 0.9, 0.999, 1e-8


class Setting(NamedTuple):
    """The work that all contestants do.

    Attributes:
        mode: "train", a training step, or "infer", from images to logits.
        variant: a name of `VARIANTS`.
        image_size: pixels.
        num_classes: of the head.
        dtype: of the computation, "float32" or "bfloat16".
        batch_size: images a step.
    """

    mode: str
    variant: str
    image_size: int
    num_classes: int
    dtype: str
    batch_size: int


# What some values of --unroll mean.
_UNROLLS = {0: "all", -1: "auto"}


class Contestant(NamedTuple):
    """One that does it.

    Attributes:
        name: for people.
        kind: `OURS`, `REFERENCE`, `EAGER` or `COMPILED`.
        unroll: of ours, as `model.scan_unroll` in keys.py.
        remat: of ours, what the backward pass recomputes.
        others: of ours, names and values of other keys of the model.
    """

    name: str
    kind: str
    unroll: int = -1
    remat: str = "auto"
    others: Sequence[tuple[str, Any]] = ()

    @property
    def framework(self) -> str:
        """Whose process it lives in."""
        return "torch" if self.kind in (EAGER, COMPILED) else "jax"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of ours that may be compared: lists."""
    for name, key, examples in (
        ("unroll", "scan_unroll", "1,12; 0: all; -1: as is best here"),
        ("remat", "remat", "none,dots,mlp_hidden,full; auto: as is best here"),
    ):
        default = FIELDS[f"model.{key}"].default
        parser.add_argument(
            f"--{name}",
            default=str(default),
            help=f"settings of ours to compare, e.g. {examples}; default: {default}",
        )


def ours(
    unrolls: Sequence[int], remats: Sequence[str], others: Mapping[str, Sequence[Any]]
) -> list[Contestant]:
    """Returns a contestant of ours for every combination of settings.

    Args:
        unrolls: blocks per iteration of the scan.
        remats: what the backward pass recomputes.
        others: values of other keys of the model, by name.
    """
    choices: dict[str, Sequence[Any]] = {"unroll": unrolls, "remat": remats, **others}
    made = []
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        told = [
            f"{name} {_UNROLLS.get(value, value) if name == 'unroll' else value}"
            for name, value in chosen.items()
            # What "auto" is differs between loops.
            if len(choices[name]) > 1 or (value == "auto" and name == "remat" and len(unrolls) > 1)
        ]
        unroll, remat = chosen.pop("unroll"), chosen.pop("remat")
        name = ", ".join([OURS, *told])
        made.append(Contestant(name, OURS, unroll, remat, tuple(chosen.items())))
    return made


def read_unrolls(text: str, num_blocks: int) -> list[int]:
    """Returns the whole numbers of --unroll.

    Raises:
        UserError: one is none, or more than there are blocks, or there twice.
    """
    numbers = [
        int(part) if part.removeprefix("-").isdecimal() else num_blocks + 1
        for part in text.split(",")
    ]
    if not all(-1 <= number <= num_blocks for number in numbers):
        raise UserError(f"--unroll={text} is no list of whole numbers from -1 to {num_blocks}")
    if len({number or num_blocks for number in numbers}) < len(numbers):
        raise UserError(f"--unroll={text} names something twice (0 is all); name each once")
    return numbers


def read_remats(text: str) -> list[str]:
    """Returns the names of --remat.

    Raises:
        UserError: one is unknown, or there twice.
    """
    return read_names("remat", text, FIELDS["model.remat"].choices)


def read_names(flag: str, text: str, choices: Sequence[str]) -> list[str]:
    """Returns the names in a list on the command line.

    Raises:
        UserError: one is not among `choices`, or there twice.
    """
    names = text.split(",")
    for name in names:
        if name not in choices:
            raise UserError(f"--{flag}={text}: {name!r} is unknown; choose of {', '.join(choices)}")
    if len(set(names)) < len(names):
        raise UserError(f"--{flag}={text} names something twice; name each once")
    return names


def check_device(contestants: Sequence[Contestant], platform: str) -> None:
    """Raises UserError unless kernels of ours run on devices of that platform, as JAX calls it."""
    # With JAX, which not all who know contestants have imported yet.
    from mixer_jax.models.execution import check_backend

    for contestant in contestants:
        check_backend(dict(contestant.others).get("backend", "auto"), platform)
