"""A model as a StableHLO program and its weights beside it, to run without this library and Flax.

The program is what `jax.export` serializes, a few kilobytes. It takes the arrays of the file of
weights by their names, and float32 images (n, height, width, 3) in [-1, 1], for any n; it returns
float32 logits, or features where there is no head. Weights inside the program would be simpler to
pass on, but compilers keep several copies of them: more than their size times 5 to convert L/16.
"""

import math
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.formats.base import atomic_target
from mixer_jax.checkpoints.formats.safetensors import write_safetensors
from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.to_device import model_from_info
from mixer_jax.errors import RunError, summarize_error
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer import MlpMixer

PLATFORMS = ("cpu", "cuda", "tpu")
# By which a written program's logits may differ from the model's: of their spread, and of the
# largest, for logits that are all but equal have no spread to speak of.
_OF_SPREAD, _OF_LARGEST = 1e-4, 1e-6
_CHECKED_BATCHES = (1, 3)


def write_stablehlo(path: str, weights_path: str, weights: PretrainedWeights) -> None:
    """Writes a program, and the weights that it takes with what they say of themselves.

    Args:
        path: of the program.
        weights_path: of the safetensors file.
        weights: of the model.

    Raises:
        UserError: they cannot be written.
    """
    model, flat = _make_model(weights.model_info), dict(tree.flatten(weights.params))

    def logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        # Said in the program, for accelerators compute float32 products from fewer bits otherwise.
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": tree.unflatten(params)}, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *weights.model_info.image_size, 3), jnp.float32)
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in flat.items()}
    program = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(arrays, images)
    with atomic_target(path) as draft:
        write_safetensors(weights_path, flat.items(), weights.model_info.to_dict())
        draft.write_bytes(program.serialize())


def check_stablehlo(path: str, weights: PretrainedWeights) -> None:
    """Runs a written program beside the model that it was made of, on the same weights.

    Args:
        path: of the program.
        weights: of the model.

    Raises:
        RunFailedError: it cannot be run, or its logits are others.
    """
    model = _make_model(weights.model_info)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (max(_CHECKED_BATCHES), *weights.model_info.image_size, 3))
    images = images.astype(np.float32)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model.apply)({"params": weights.params}, images))
    allowed = _OF_SPREAD * np.ptp(logits) + _OF_LARGEST * np.abs(logits).max()
    flat = dict(tree.flatten(weights.params))
    for size in _CHECKED_BATCHES:
        try:
            program = jax.export.deserialize(bytearray(Path(path).read_bytes()))
            found = np.asarray(program.call(flat, images[:size]))
        except Exception as error:
            # A damaged file: whatever the parser or the compiler stumbles over first.
            raise RunError(_differs(path, f"cannot be run: {summarize_error(error)}")) from error
        wanted = logits[:size]
        difference = np.abs(found - wanted).max() if found.shape == wanted.shape else math.inf
        # Not the other way round: a difference may be no number.
        if not difference <= allowed:
            raise RunError(
                _differs(path, f"gives logits that differ by {difference:.3g}, not {allowed:.3g}")
            )


def _make_model(about: ModelInfo) -> MlpMixer:
    # Independent of the device that the program is written on. A scan over the blocks runs as fast
    # as unrolled blocks and compiles in half the time.
    execution = Execution("float32", backend="xla", scan_unroll=1, flatten_batch=False)
    return model_from_info(about, "float32").clone(execution=execution)


def _differs(path: str, what: str) -> str:
    return f"{Path(path).name} {what}; it is removed, for it is not the model it was made of"
