"""Execution settings of a model, which never change what it computes. Does not import JAX."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from mixer_jax.errors import UserError

Backend = Literal["xla", "triton", "mosaic"]
# From the least to the most recomputation; planning relies on this order.
Remat = Literal["none", "dots", "mlp_hidden", "full"]

# Values of config keys that leave the choice to the platform.
AUTO, AUTO_UNROLL = "auto", -1
# The platform of each backend that runs on one platform only, as JAX names it.
_BACKEND_PLATFORM = {"triton": "gpu", "mosaic": "tpu"}


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execution settings of a model.

    Attributes:
        dtype: Dtype of activations and matmuls, by name. Parameters, LayerNorm statistics and the
            head are float32.
        backend: Implementation of the blocks: "xla", the compiler alone; "triton", custom kernels
            for GPUs; "mosaic", custom kernels for TPUs. The last two need all images on one device.
            Training with dropout uses "xla", and so do families without such kernels.
        scan_unroll: Blocks per iteration of a scan over blocks; 0 unrolls all of them.
        remat: Rematerialization policy of the backward pass: "none"; "dots", save matmuls;
            "mlp_hidden", recompute the hidden activations of MLPs; "full", recompute whole blocks.
        flatten_batch: Whether MLPs see the vectors of all images as the rows of one matrix, which
            is fastest on CPUs. None: if the device is a CPU.
        target_device_kind: Device that programs are compiled for, as `Device.device_kind`. Empty:
            the first one of this process.
        interpret: Whether to run custom kernels in Pallas' interpreter, slowly, on any device.
    """

    dtype: Any = "float32"
    backend: Backend = "xla"
    scan_unroll: int = 0
    remat: Remat = "none"
    flatten_batch: bool | None = None
    target_device_kind: str = ""
    interpret: bool = False

    def __post_init__(self) -> None:
        """Replaces a dtype, such as `jnp.bfloat16`, by its name."""
        if not isinstance(self.dtype, str):
            import numpy as np

            object.__setattr__(self, "dtype", np.dtype(self.dtype).name)


def resolve_execution(
    section: Mapping[str, Any], platform: str, num_blocks: int, backends: Collection[str]
) -> dict[str, Any]:
    """Resolves every `auto` setting of a config's model section for a platform.

    Args:
        section: Includes dtype, backend, dropout, scan_unroll and remat.
        platform: Platform of the device, as JAX names it: cpu, gpu or tpu.
        num_blocks: Blocks of the model that can be scanned over.
        backends: Custom backends of the family.
    """
    resolved = dict(section)
    if resolved["dtype"] == AUTO:
        resolved["dtype"] = default_dtype(platform)
    if resolved["backend"] == AUTO:
        # The kernels for GPUs were measured to be faster than XLA. Those for TPUs have not been
        # timed; only their compiler's estimates are known.
        resolved["backend"] = "triton" if platform == "gpu" and "triton" in backends else "xla"
    uses_xla = resolved["backend"] == "xla" or bool(resolved["dropout"])
    if resolved["scan_unroll"] == AUTO_UNROLL:
        # A scan copies the residuals saved for the backward pass into stacks and out again. That
        # costs GPUs a third more time, and custom TPU kernels 40 % more bytes. CPUs are as fast
        # with a scan, and compile in half the time.
        is_unrolled = platform == "gpu" or not uses_xla or not num_blocks
        resolved["scan_unroll"] = 0 if is_unrolled else 1
    if resolved["remat"] == AUTO:
        # With "dots", a scan copies fewer residuals, which saves memory and, on CPUs, 0 to 14 % of
        # the time; on a TPU, 3 % of the bytes. Custom kernels would run twice.
        is_scanned = 0 < resolved["scan_unroll"] < num_blocks
        resolved["remat"] = "dots" if is_scanned and uses_xla else "none"
    return resolved


def default_dtype(platform: str) -> str:
    """Returns float32 on CPUs, bfloat16 on accelerators."""
    return "float32" if platform == "cpu" else "bfloat16"


def check_backend(backend: str, platform: str, backends: Collection[str]) -> None:
    """Raises UserError unless a family has a backend, and it runs on a platform."""
    if backend not in (AUTO, "xla", *backends):
        names = ", ".join([AUTO, "xla", *backends])
        raise UserError(f"model.backend must be one of {names} for this model, got {backend!r}.")
    if (needed := _BACKEND_PLATFORM.get(backend, platform)) != platform:
        raise UserError(
            f"model.backend={backend} needs a {needed.upper()}, got a {platform.upper()}. "
            "Set auto or xla."
        )
