"""What the XLA compiler is asked for, by platform: the one place of such options."""

import functools
from typing import Any

import jax

# By `Device.platform`. Not in XLA_FLAGS, where a name that a version of XLA does not know ends the
# process.
PLATFORM_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # Orders a program so that it computes while collectives are under way: gradients that are
        # ready are summed while the backward pass goes on. Recommended by JAX's "GPU performance
        # tips"; not the default of every version. Without effect on one GPU.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Products by cuBLAS, whose epilogues add biases and take the GELU. Fused by XLA's own
        # compiler of products instead, the same programs ran up to 1.18 times longer on an H200.
        "xla_gpu_enable_triton_gemm": False,
    },
    # The TPU compiler overlaps by default, and the CPU's has nothing to overlap.
}

# Further ones, by what computes the blocks (`model.backend`).
BACKEND_OPTIONS: dict[str, dict[str, Any]] = {
    "triton": {
        # The pass pads every side of a product to a multiple of 8, such as 196 tokens, and copies
        # the operands for it, so that rows begin where fast products want them. Ours do anyway.
        # Seen to work with jax 0.11.2; a name that a version of XLA does not know does nothing.
        "xla_disable_hlo_passes": "cublas-pad-for-gemms",
    },
}


def compiler_options(platform: str, kernels: str) -> dict[str, Any]:
    """Returns the options for the steps of training and inference, as `jax.jit` takes them.

    Options that this version of XLA does not know are left out.

    Args:
        platform: of the devices.
        kernels: what computes the blocks, as `MlpMixer` takes it.
    """
    options = PLATFORM_OPTIONS.get(platform, {}) | BACKEND_OPTIONS.get(kernels, {})
    return {name: value for name, value in options.items() if is_supported(name, value)}


@functools.cache
def is_supported(name: str, value: Any) -> bool:
    """Returns whether this version of XLA takes an option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
