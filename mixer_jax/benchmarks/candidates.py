"""Candidates of a comparison, and the workload that each of them runs. Does not import JAX."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixer_jax.models.execution import check_backend
from mixer_jax.models.registry import DEFAULT_FAMILY, get_family

# Frameworks, each measured in a process of its own.
JAX, TORCH = "jax", "torch"
# Family that is measured.
FAMILY = get_family(DEFAULT_FAMILY)
# Implementations of a Mixer.
MIXER_JAX, REFERENCE, TIMM, TIMM_COMPILED = "mixer_jax", "reference", "timm", "timm, torch.compile"

# Optimizer of every candidate: Adam with decoupled weight decay of kernels and gradient clipping.
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.1, 1.0
B1, B2, EPS = 0.9, 0.999, 1e-8

# Names of two values of scan_unroll.
_SCAN_UNROLLS = {0: "all", -1: "auto"}


class Workload(NamedTuple):
    """Work that every candidate of a comparison does.

    Attributes:
        mode: "train", a training step, or "infer", from images to logits.
        variant: Variant of `FAMILY`.
        image_size: Side of the square images, in pixels.
        num_classes: Outputs of the head.
        dtype: Dtype of activations and matmuls, "float32" or "bfloat16".
        batch_size: Images per step.
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
        name: Unique name, shown in tables.
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

    Args:
        choices: Values to compare, by key of the config's model section.
    """
    candidates = []
    for values in itertools.product(*choices.values()):
        overrides = dict(zip(choices, values, strict=True))
        name = ", ".join([MIXER_JAX, *_varied_settings(overrides, choices)])
        candidates.append(Candidate(name, MIXER_JAX, overrides))
    return candidates


def _varied_settings(
    overrides: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Formats the settings in which candidates differ."""
    varied = {name for name, values in choices.items() if len(values) > 1}
    # remat=auto means different policies with and without a scan.
    if "scan_unroll" in varied and overrides.get("remat") == "auto":
        varied.add("remat")
    names = _SCAN_UNROLLS
    return [
        f"{name}={names.get(value, value) if name == 'scan_unroll' else value}"
        for name, value in overrides.items()
        if name in varied
    ]


def check_backends(candidates: Sequence[Candidate], platform: str) -> None:
    """Raises UserError unless all backends run on a platform, as JAX names it."""
    for candidate in candidates:
        check_backend(candidate.overrides.get("backend", "auto"), platform, FAMILY.block_backends)
