"""A model and its weights as one StableHLO program, to run without this library and Flax.

The file is what `jax.export` serializes. Its program takes float32 images (n, height, width, 3) in
[-1, 1], for any n, and returns float32 logits, or features where there is no head.

This takes more memory than files of tensors do, for compilers hold copies of the parameters:
converting L/16, 0.83 GB, peaks at 5.9 times that, when the written program is compiled to be
checked, and a user's first call of it at 5.4 times.
"""

import gc
import json
import math
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mixer_jax.errors import RunFailedError, UserError, one_line
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.weights import tree
from mixer_jax.weights.about import About
from mixer_jax.weights.load import Weights
from mixer_jax.weights.npz_file import SAID_SUFFIX
from mixer_jax.weights.ready import make_model
from mixer_jax.weights.tensor_file import whole

PLATFORMS = ("cpu", "cuda", "tpu")
# The format counts its bytes in 31 bits; the program beside the parameters is far below this slack.
_MAX_BYTES = 2**31 - 2**24
# By which a written program's logits may differ from the model's: of their spread, and of the
# largest, for logits that are all but equal have no spread to speak of.
_OF_SPREAD, _OF_LARGEST = 1e-4, 1e-6
_CHECKED_BATCHES = (1, 3)


def write_stablehlo(path: str, weights: Weights) -> None:
    """Writes a program, and what its weights say of themselves as JSON beside it.

    Args:
        path: of the file.
        weights: that the program contains.

    Raises:
        UserError: it cannot be written, or the weights are too large for one file.
    """
    size = sum(array.nbytes for _, array in tree.leaves(weights.params))
    if size > _MAX_BYTES:
        raise UserError(
            f"{weights.about.name} has {size / 1e6:,.0f} MB of weights, and a StableHLO file holds "
            f"{_MAX_BYTES / 1e6:,.0f} MB at most; choose another format"
        )
    model, params = _make_model(weights.about), weights.params

    def logits(images: jax.Array) -> jax.Array:
        # Said in the program, for accelerators compute float32 products from fewer bits otherwise.
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *weights.about.image_size, 3), jnp.float32)
    program = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    _let_go()
    content = program.serialize()
    del program
    with whole(path) as draft, whole(path + SAID_SUFFIX) as said_draft:
        draft.write_bytes(content)
        said = json.dumps(weights.about.to_json(), indent=2)
        said_draft.write_text(said + "\n", encoding="utf-8")
    del content
    _let_go()


def check_stablehlo(path: str, weights: Weights) -> None:
    """Runs a written program beside the model that it was made of.

    Args:
        path: of the file.
        weights: that were written.

    Raises:
        RunFailedError: it cannot be run, or its logits are others.
    """
    model = _make_model(weights.about)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (max(_CHECKED_BATCHES), *weights.about.image_size, 3))
    images = images.astype(np.float32)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model.apply)({"params": weights.params}, images))
    _let_go()
    allowed = _OF_SPREAD * np.ptp(logits) + _OF_LARGEST * np.abs(logits).max()
    for size in _CHECKED_BATCHES:
        wanted = logits[:size]
        found = _run(path, images[:size])
        difference = np.abs(found - wanted).max() if found.shape == wanted.shape else math.inf
        # Not the other way round: a difference may be no number.
        if not difference <= allowed:
            raise RunFailedError(
                _differs(path, f"gives logits that differ by {difference:.3g}, not {allowed:.3g}")
            )


def _run(path: str, images: np.ndarray) -> np.ndarray:
    """Returns what a written program computes.

    Raises:
        RunFailedError: it cannot be run.
    """
    doing = "read back"
    try:
        program = jax.export.deserialize(bytearray(Path(path).read_bytes()))
        doing = "run"
        lowered = jax.jit(program.call).lower(images)
        # Each holds the parameters once: what has been used goes before the next is made.
        del program
        _let_go()
        compiled = lowered.compile()
        del lowered
        logits = np.array(compiled(images))
        del compiled
        _let_go()
    except Exception as error:
        # A damaged file: whatever the parser or the compiler stumbles over first.
        raise RunFailedError(_differs(path, f"cannot be {doing}: {one_line(error)}")) from error
    return logits


def _let_go() -> None:
    """Frees what JAX keeps of programs: their parameters, several times over."""
    jax.clear_caches()
    gc.collect()


def _make_model(about: About) -> MlpMixer:
    # One block in a loop runs as fast as all of them in a row, and compiles in half the time.
    return make_model(about, "float32").clone(unroll=1)


def _differs(path: str, what: str) -> str:
    return f"{Path(path).name} {what}; it is removed, for it is not the model it was made of"
