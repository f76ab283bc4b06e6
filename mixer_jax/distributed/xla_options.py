"""XLA compiler options per platform and block backend: the only place that sets them."""

import functools
from typing import Any

import jax

# By `jax.Device.platform`. Not set through XLA_FLAGS, where an unknown name ends the process.
PLATFORM_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        # Overlaps collectives with computation: gradients are summed while the backward pass
        # continues. Recommended by JAX's "GPU performance tips", and not the default of every
        # version. Has no effect on one GPU.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Uses cuBLAS for matmuls, whose epilogues add biases and apply the GELU. With XLA's Triton
        # matmuls, the same programs took up to 1.18 times as long on an H200.
        "xla_gpu_enable_triton_gemm": False,
    },
    # The TPU compiler overlaps collectives by default; on CPUs there is nothing to overlap.
}

# Additional options by block backend (`model.backend`).
BACKEND_OPTIONS: dict[str, dict[str, Any]] = {
    "triton": {
        # The pass pads every dimension of a matmul, such as 196 tokens, to a multiple of 8, and
        # copies the operands to align rows for fast matmuls. The rows of this backend are aligned
        # anyway. Verified with jax 0.11.2; XLA ignores unknown pass names.
        "xla_disable_hlo_passes": "cublas-pad-for-gemms",
    },
}


def compiler_options(platform: str, backend: str) -> dict[str, Any]:
    """Returns the `jax.jit` options of training and inference that this version of XLA supports."""
    options = PLATFORM_OPTIONS.get(platform, {}) | BACKEND_OPTIONS.get(backend, {})
    return {name: value for name, value in options.items() if is_supported(name, value)}


@functools.cache
def is_supported(name: str, value: Any) -> bool:
    """Returns whether this version of XLA accepts a compiler option."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
