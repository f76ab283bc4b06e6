"""Programs compiled for devices that are not here, the real training and evaluation step first."""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.errors import summarize_error
from mixer_jax.evaluation.classification import make_eval_step
from mixer_jax.planning.dataset_specs import placeholder_datasets
from mixer_jax.planning.hlo.program import Program, read_program
from mixer_jax.training.setup import Experiment, build_experiment

_SIZE = r"(\d+(?:\.\d+)?)([KMGT])"
_SCALES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the compiler says of a program that does not fit: its temporaries alone, or all of it. It
# may run out of on-chip memory (vmem), too, which says nothing of how much a run needs.
_TOO_LARGE = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE}i?B? of {_SIZE}i?B? hbm"),
)
# The least optimization: it takes most of the time.
_QUICK = "O1"


class Compiled(NamedTuple):
    """A compiled program; bytes are those of one device.

    Attributes:
        seconds: that compiling took.
        arguments: bytes of state and batch.
        outputs: bytes of results that do not take the place of arguments.
        temporaries: bytes of activations, gradients and the like.
        code: bytes.
        text: what the compiler made.
        program: the same, read.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    text: str
    program: Program

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.arguments + self.outputs + self.temporaries + self.code


class OutOfMemory(NamedTuple):
    """A program that does not fit into a device's memory.

    Attributes:
        seconds: that compiling took.
        needed: bytes that the compiler says it needs, at the least; None: it does not say.
        allowed: bytes that it may have; 0: it does not say.
        said: by the compiler instead, in one line; empty where `needed` is known.
        only_temporaries: whether `needed` leaves out state and batch.
    """

    seconds: float
    needed: float | None
    allowed: float
    said: str
    only_temporaries: bool


def build_for_topology(config: ConfigDict, devices: Sequence[Any]) -> Experiment:
    """Returns the parts of a run on these devices, with as much data as the config says.

    Args:
        config: as `plannable` returns it.
        devices: from `tpu_devices`.

    Raises:
        UserError: as `build_experiment` and `placeholder_datasets`.
    """
    return build_experiment(config, placeholder_datasets(config), devices=list(devices))


def compile_train_step(experiment: Experiment, quick: bool = False) -> Compiled | OutOfMemory:
    """Compiles the training step.

    Args:
        experiment: from `build_for_topology`.
        quick: whether to compile for less long and so to a somewhat slower program.
    """
    batch = _batch(experiment, experiment.config.batch_size)
    return compile_function(experiment.train_step, experiment.state_shape, batch, quick=quick)


def compile_eval_step(experiment: Experiment, quick: bool = False) -> Compiled | OutOfMemory:
    """Compiles the step that scores a batch of `config.eval_batch_size`.

    Args:
        experiment: from `build_for_topology`.
        quick: as for `compile_train_step`.
    """
    size = experiment.config.eval_batch_size
    judge = make_eval_step(experiment.model, experiment.mesh)
    lies = batch_sharding(experiment.mesh)
    mask = jax.ShapeDtypeStruct((size,), jnp.bool_, sharding=lies)
    batch = _batch(experiment, size) | {"mask": mask}
    return compile_function(judge, experiment.state_shape.eval_params, batch, quick=quick)


def _batch(experiment: Experiment, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    side, lies = experiment.config.image_size, batch_sharding(experiment.mesh)
    return {
        "image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8, sharding=lies),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=lies),
    }


def compile_function(function: Any, *shapes: Any, quick: bool = False) -> Compiled | OutOfMemory:
    """Compiles a function for the TPU devices that its arguments lie on.

    Args:
        function: as `jax.jit` returns it.
        *shapes: of its arguments, with their shardings.
        quick: whether to compile for less long and so to a somewhat slower program.
    """
    lowered = function.trace(*shapes).lower(lowering_platforms=("tpu",))
    usual: Any = jax.config.values["jax_optimization_level"]
    start = time.perf_counter()
    try:
        jax.config.update("jax_optimization_level", _QUICK if quick else usual)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return parse_oom(error, time.perf_counter() - start)
    finally:
        jax.config.update("jax_optimization_level", usual)
    seconds, size = time.perf_counter() - start, compiled.memory_analysis()
    text = compiled.as_text()
    return Compiled(
        seconds,
        size.argument_size_in_bytes,
        size.output_size_in_bytes - size.alias_size_in_bytes,
        size.temp_size_in_bytes,
        size.generated_code_size_in_bytes,
        text,
        read_program(text),
    )


def parse_oom(error: Exception, seconds: float) -> OutOfMemory:
    """Returns what a compiler's error says of a program that does not fit.

    Args:
        error: that was raised.
        seconds: after which.

    Raises:
        Exception: the error itself, where it is another.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    for number, pattern in enumerate(_TOO_LARGE):
        if found := pattern.search(str(error)):
            needed, unit, allowed, allowed_unit = found.groups()
            return OutOfMemory(
                seconds,
                float(needed) * _SCALES[unit],
                float(allowed) * _SCALES[allowed_unit],
                said="",
                only_temporaries=number == 0,
            )
    return OutOfMemory(seconds, None, 0.0, summarize_error(error), only_temporaries=False)
