"""A model as a StableHLO program and a file of weights, to run without this library and Flax.

The program, serialized by `jax.export`, has a few kilobytes. It takes the tensors in the file of
weights by name, and float32 images (n, height, width, 3) in [-1, 1], for any n. It returns float32
logits, or features without a head. Weights as constants of the program would be simpler to
distribute, but compilers keep several copies of them: converting L/16 took over 5 times its size.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints.formats import write_safetensors
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params, unflatten_params
from mixer_jax.errors import RunError, summarize_error
from mixer_jax.models.execution import Execution

PLATFORMS = ("cpu", "cuda", "tpu")
# Tolerance of a program's logits: of the standard deviation of the model's logits, and of the
# largest, as logits of a new head hardly vary.
_DEVIATION_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-4, 1e-6
_CHECKED_BATCH_SIZES = (1, 3)


def write_stablehlo(path: str, weights_path: str, weights: PretrainedWeights) -> None:
    """Writes a program, and its weights to a safetensors file."""
    model, flat = _build_model(weights.model_info), dict(flatten_params(weights.params))

    def compute_logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        # In the program, because accelerators use fewer bits for float32 matmuls by default.
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": unflatten_params(params)}, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *weights.model_info.image_size, 3), jnp.float32)
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in flat.items()}
    program = jax.export.export(jax.jit(compute_logits), platforms=PLATFORMS)(arrays, images)
    write_safetensors(weights_path, flat.items(), weights.model_info.to_dict())
    Path(path).write_bytes(program.serialize())


def check_stablehlo(path: str, weights: PretrainedWeights) -> None:
    """Compares a written program with the model, on the same weights and random images.

    Raises:
        RunError: The program cannot be run, or its logits differ.
    """
    flat = dict(flatten_params(weights.params))

    def run(images: np.ndarray) -> np.ndarray:
        program = jax.export.deserialize(bytearray(Path(path).read_bytes()))
        return np.asarray(program.call(flat, images))

    check_logits(path, weights, run)


def check_logits(
    path: str, weights: PretrainedWeights, run: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Compares the logits of an exported program with the model's, on random images.

    Args:
        path: File of the program, for error messages.
        weights: Weights of the model.
        run: Runs the program on a batch of images.

    Raises:
        RunError: The program cannot be run, or its logits differ.
    """
    model = _build_model(weights.model_info)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (max(_CHECKED_BATCH_SIZES), *weights.model_info.image_size, 3))
    images = images.astype(np.float32)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model.apply)({"params": weights.params}, images))
    tolerance = _DEVIATION_TOLERANCE * logits.std() + _ABSOLUTE_TOLERANCE * np.abs(logits).max()
    for batch_size in _CHECKED_BATCH_SIZES:
        try:
            found = run(images[:batch_size])
        except Exception as error:  # Parsers and compilers raise errors of many types.
            raise _mismatch(path, f"cannot be run: {summarize_error(error)}") from error
        expected = logits[:batch_size]
        difference = np.abs(found - expected).max() if found.shape == expected.shape else math.inf
        if not difference <= tolerance:  # Also if it is NaN.
            raise _mismatch(
                path,
                f"has logits that differ from the model's by {difference:.3g}, more than "
                f"{tolerance:.3g}",
            )


def _build_model(model_info: ModelInfo) -> Any:
    # The program must not depend on the device it is written on. A scan over blocks compiles in
    # half the time of unrolled blocks and runs as fast.
    execution = Execution("float32", backend="xla", scan_unroll=1, flatten_batch=False)
    return model_info.build_model("float32").clone(execution=execution)


def _mismatch(path: str, problem: str) -> RunError:
    return RunError(f"{Path(path).name} {problem}. It was deleted.")
