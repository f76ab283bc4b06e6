"""What the model's keys mean where they leave the choice, by platform. Imports nothing heavy.

Platforms are named as JAX names them: cpu, gpu, tpu.
"""


def default_dtype(platform: str) -> str:
    """Returns the type of the computation."""
    return "float32" if platform == "cpu" else "bfloat16"


def default_kernels(platform: str) -> str:
    """Returns what computes the blocks: hand-written kernels where they were measured to be faster.

    That is on GPUs; of TPUs only their compiler's reckoning is known.
    """
    return "triton" if platform == "gpu" else "xla"


def default_unroll(platform: str, kernels: str, dropout: float) -> int:
    """Returns blocks per iteration of the loop: all (0) on GPUs and with kernels, else 1.

    In a loop what is kept for the backward pass is copied into stacks and out again, which costs
    GPUs a third more time, and kernels of our own for TPUs 40 % more bytes. CPUs are as fast that
    way, and compile in half the time.

    Args:
        platform: of the devices.
        kernels: that compute the blocks.
        dropout: of the model, with which training leaves kernels of our own out.
    """
    by_kernels = kernels != "xla" and not dropout
    return 0 if platform == "gpu" or by_kernels else 1
