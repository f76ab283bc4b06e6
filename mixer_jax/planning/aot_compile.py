"""Ahead-of-time compilation of a run's training and evaluation step for absent TPUs."""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.errors import summarize_error
from mixer_jax.evaluation.classification import make_eval_step
from mixer_jax.planning.hlo import Program, parse_program
from mixer_jax.planning.run_spec import placeholder_datasets
from mixer_jax.training.setup import Experiment, build_experiment

_SIZE = r"(\d+(?:\.\d+)?)([KMGT])"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Compiler messages about a program that does not fit into HBM: its temporaries, or all of it. The
# compiler may also run out of on-chip memory (VMEM), which says nothing about the HBM of the run.
_TEMPORARIES_EXCEED_HBM = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_PROGRAM_EXCEEDS_HBM = re.compile(rf"Used {_SIZE}i?B? of {_SIZE}i?B? hbm")
_FAST_OPTIMIZATION_LEVEL = "O1"


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        argument_bytes: Bytes of state and batch, per device.
        output_bytes: Bytes of results that do not alias arguments, per device.
        temporary_bytes: Bytes of activations, gradients and other temporaries, per device.
        code_bytes: Bytes of code, per device.
        text: Text of the program.
        program: The same, parsed.
    """

    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    text: str
    program: Program

    @property
    def total_bytes(self) -> int:
        """Bytes of memory, per device."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


class OutOfMemory(NamedTuple):
    """A program that does not fit into device memory.

    Attributes:
        needed_bytes: Lower bound on the bytes that the program needs; None if unknown.
        available_bytes: Bytes available to the program; 0 if unknown.
        message: Message of the compiler if `needed_bytes` is None, in one line.
        excludes_arguments: Whether `needed_bytes` leaves out state and batch.
    """

    compile_seconds: float
    needed_bytes: float | None
    available_bytes: float
    message: str
    excludes_arguments: bool


def build_for_topology(config: RunConfig, devices: Sequence[Any]) -> Experiment:
    """Builds model, mesh and step functions of a run, with placeholder datasets.

    Raises:
        UserError: The config does not fit the devices or leaves the dataset's size open.
    """
    return build_experiment(config, placeholder_datasets(config), devices=list(devices))


def compile_train_step(
    experiment: Experiment, fast_compile: bool = False
) -> Compiled | OutOfMemory:
    """Compiles the training step; `fast_compile` takes less time and optimizes less."""
    batch = _batch_shapes(experiment, experiment.config.batch_size)
    return compile_function(
        experiment.train_step,
        experiment.state_shape,
        batch,
        experiment.hyperparams,
        fast_compile=fast_compile,
    )


def compile_eval_step(experiment: Experiment, fast_compile: bool = False) -> Compiled | OutOfMemory:
    """Compiles the evaluation step; `fast_compile` takes less time and optimizes less."""
    size = experiment.config.eval_batch_size
    sharding = batch_sharding(experiment.mesh)
    mask = jax.ShapeDtypeStruct((size,), jnp.bool_, sharding=sharding)
    batch = _batch_shapes(experiment, size) | {"mask": mask}
    eval_step = make_eval_step(experiment.model, experiment.mesh)
    params = experiment.state_shape.eval_params
    return compile_function(eval_step, params, batch, fast_compile=fast_compile)


def _batch_shapes(experiment: Experiment, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    image_shape = (batch_size, *[experiment.config.image_size] * 2, 3)
    sharding = batch_sharding(experiment.mesh)
    return {
        "image": jax.ShapeDtypeStruct(image_shape, jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding),
    }


def compile_function(
    function: Any, *shapes: Any, fast_compile: bool = False
) -> Compiled | OutOfMemory:
    """Compiles a function returned by `jax.jit` for the TPUs of its arguments' shardings.

    Args:
        function: Function to compile.
        *shapes: Its arguments, or their shapes with shardings.
        fast_compile: Whether to compile in less time to a less optimized program.
    """
    lowered = function.trace(*shapes).lower(lowering_platforms=("tpu",))
    default_level: Any = jax.config.values["jax_optimization_level"]
    level = _FAST_OPTIMIZATION_LEVEL if fast_compile else default_level
    start = time.perf_counter()
    try:
        jax.config.update("jax_optimization_level", level)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return parse_oom(error, time.perf_counter() - start)
    finally:
        jax.config.update("jax_optimization_level", default_level)
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    text = compiled.as_text()
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        text,
        parse_program(text),
    )


def parse_oom(error: Exception, compile_seconds: float) -> OutOfMemory:
    """Parses a compiler error about a program that does not fit into memory.

    Raises:
        Exception: The error itself, if it is about something else.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    temporaries = _TEMPORARIES_EXCEED_HBM.search(text)
    match = temporaries or _PROGRAM_EXCEEDS_HBM.search(text)
    if match is None:
        message = summarize_error(error)
        return OutOfMemory(compile_seconds, None, 0.0, message, excludes_arguments=False)
    needed, unit, available, available_unit = match.groups()
    return OutOfMemory(
        compile_seconds,
        float(needed) * _UNITS[unit],
        float(available) * _UNITS[available_unit],
        message="",
        excludes_arguments=temporaries is not None,
    )
