"""What the model's keys mean where they leave the choice, by platform. Imports nothing heavy.

Platforms are named as JAX names them: cpu, gpu, tpu.
"""

from collections.abc import Mapping
from typing import Any

from mixer_jax.model.variants import resolve_widths

# What keys say where they leave the choice.
AUTO, AUTO_UNROLL = "auto", -1


def settled(section: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Returns a configuration's model section with dtype, backend, scan_unroll and remat chosen.

    Args:
        section: the keys under `model` in keys.py.
        platform: of the devices.
    """
    chosen = dict(section)
    if chosen["dtype"] == AUTO:
        chosen["dtype"] = default_dtype(platform)
    if chosen["backend"] == AUTO:
        chosen["backend"] = default_kernels(platform)
    by_xla = chosen["backend"] == "xla" or bool(chosen["dropout"])
    if chosen["scan_unroll"] == AUTO_UNROLL:
        chosen["scan_unroll"] = default_unroll(platform, by_xla)
    if chosen["remat"] == AUTO:
        all_blocks = chosen.get("num_blocks") or resolve_widths(chosen["variant"]).num_blocks
        chosen["remat"] = default_remat(0 < chosen["scan_unroll"] < all_blocks, by_xla)
    return chosen


def default_dtype(platform: str) -> str:
    """Returns the type of the computation."""
    return "float32" if platform == "cpu" else "bfloat16"


def default_kernels(platform: str) -> str:
    """Returns what computes the blocks: hand-written kernels where they were measured to be faster.

    That is on GPUs; of TPUs only their compiler's reckoning is known.
    """
    return "triton" if platform == "gpu" else "xla"


def default_unroll(platform: str, by_xla: bool) -> int:
    """Returns blocks per iteration of the loop: all (0) on GPUs and with kernels, else 1.

    In a loop what is kept for the backward pass is copied into stacks and out again, which costs
    GPUs a third more time, and kernels of our own for TPUs 40 % more bytes. CPUs are as fast that
    way, and compile in half the time.

    Args:
        platform: of the devices.
        by_xla: whether the compiler alone computes the blocks in training, as it does with dropout.
    """
    return 0 if platform == "gpu" or not by_xla else 1


def default_remat(in_loop: bool, by_xla: bool) -> str:
    """Returns what the backward pass recomputes: all but products in a loop of XLA's, else nothing.

    Less is copied into stacks and out again then, which saves memory and, on CPUs, 0 to 14 % of the
    time, on a TPU 3 % of the bytes. Kernels of our own would be computed twice.

    Args:
        in_loop: whether the blocks lie in a loop.
        by_xla: as of `default_unroll`.
    """
    return "dots" if in_loop and by_xla else "none"
