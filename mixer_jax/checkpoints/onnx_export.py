"""A model as an ONNX file with its weights, to run in onnxruntime without this library and JAX.

The file takes "images", float32 (n, height, width, 3) in [-1, 1], for any n, as StableHLO programs
do. It returns float32 "logits", or "features" without a head. Its metadata are the fields of
`ModelInfo`, each as JSON.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

import mixer_jax
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.stablehlo import check_logits
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.errors import RunError, UserError, summarize_error
from mixer_jax.models.execution import Execution

# Version of the operators. Later versions add none that models need.
_OPSET = 21
# Protocol buffers, which ONNX files are, cannot be larger; the margin is for the graph.
_MAX_BYTES = 2**31 - 2**24
# They report details of the conversion that users can do nothing about.
_VERBOSE_LOGGERS = ("jax2onnx", "onnx_ir")


def write_onnx(path: str, weights: PretrainedWeights) -> None:
    """Writes a model and its weights as an ONNX file.

    Raises:
        UserError: The weights are too large for a file.
        RunError: jax2onnx cannot convert the model.
    """
    info = weights.model_info
    num_bytes = sum(array.nbytes for _, array in flatten_params(weights.params))
    if num_bytes > _MAX_BYTES:
        raise UserError(
            f"target must be smaller than 2 GB to be an ONNX file, got {num_bytes / 1e9:.1f} GB of "
            f"weights of {info.name}. Pass --to=stablehlo."
        )
    with _quiet_loggers():
        # Imported here: it imports all of Flax.
        import jax2onnx

        try:
            (batch,) = jax.export.symbolic_shape("batch")
            images = jax.ShapeDtypeStruct((batch, *info.image_size, 3), jnp.float32)
            program = _trace(weights, images)
            model = jax2onnx.to_onnx(
                lambda images: _evaluate(program, images)[0],
                [images],
                model_name=info.name,
                opset=_OPSET,
                input_names=["images"],
                output_names=["logits" if info.num_classes else "features"],
            )
        except Exception as error:  # Converters raise errors of many types.
            raise RunError(
                f"{info.name} cannot be converted to ONNX: {summarize_error(error)}. Pass "
                "--to=stablehlo."
            ) from error
    model.producer_name, model.producer_version = "mixer_jax", mixer_jax.__version__
    for name, value in _metadata(info).items():
        model.metadata_props.add(key=name, value=value)
    Path(path).write_bytes(model.SerializeToString())


def check_onnx(path: str, weights: PretrainedWeights) -> None:
    """Compares a written file in onnxruntime with the model, on random images.

    Raises:
        RunError: The file cannot be run, or its logits or metadata differ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Only errors; it warns of every constant that it removes.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(
            f"{Path(path).name} cannot be read by onnxruntime: {summarize_error(error)}. It was "
            "deleted."
        ) from error
    if session.get_modelmeta().custom_metadata_map != _metadata(weights.model_info):
        raise RunError(f"{Path(path).name} has other metadata than the weights. It was deleted.")
    check_logits(path, weights, lambda images: session.run(None, {"images": images})[0])


def _metadata(info: ModelInfo) -> dict[str, str]:
    fields = {name: json.dumps(value) for name, value in info.to_dict().items()}
    return {"model": info.name, "mixer_jax_version": mixer_jax.__version__, **fields}


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _VERBOSE_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace(weights: PretrainedWeights, images: jax.ShapeDtypeStruct) -> ClosedJaxpr:
    """Traces a model with its weights as constants, without calls of functions."""
    # Blocks are unrolled, which runtimes optimize better than loops.
    execution = Execution("float32", backend="xla", scan_unroll=0, flatten_batch=False)
    model = weights.model_info.build_model("float32").clone(execution=execution)
    traced = jax.make_jaxpr(lambda x: model.apply({"params": weights.params}, x))(images)
    return jax.make_jaxpr(lambda x: _evaluate(traced, x))(images)


def _evaluate(program: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Computes a program, with the same result but operations that onnxruntime can run.

    Calls are inlined, operations without an effect are left out, and those on constants are
    computed: jax2onnx takes a time that grows with the square of the number of operations.
    """
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in _needed_equations(jaxpr):
        inputs = [read(variable) for variable in equation.invars]
        name, params = equation.primitive.name, equation.params
        called = params.get("jaxpr", params.get("call_jaxpr"))
        if called is not None:
            outputs = _evaluate(called, *inputs)
        elif _is_constant(equation, inputs):
            with jax.ensure_compile_time_eval():
                outputs = _bind(equation, inputs)
        elif name in _REPLACEMENTS:
            outputs = [_REPLACEMENTS[name](*inputs, **params)]
        else:
            outputs = _bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _needed_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Lists the equations that the results depend on, in order."""
    needed, equations = set(), []
    for variable in jaxpr.outvars:
        if not isinstance(variable, Literal):
            needed.add(variable)
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= {v for v in equation.invars if not isinstance(v, Literal)}
            equations.append(equation)
    return equations[::-1]


def _is_constant(equation: Any, inputs: list[Any]) -> bool:
    shapes = [variable.aval.shape for variable in equation.outvars]
    is_static = all(isinstance(length, int) for shape in shapes for length in shape)
    return is_static and not any(isinstance(value, jax.core.Tracer) for value in inputs)


def _bind(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _pad(x: Any, value: Any, *, padding_config: Any) -> Any:
    """Pads by concatenation: jax2onnx's padding needs a constant batch size."""
    for axis, (before, after, _) in enumerate(padding_config):
        margins = [
            lax.broadcast_in_dim(value, (*x.shape[:axis], length, *x.shape[axis + 1 :]), ())
            for length in (before, after)
        ]
        if before or after:
            x = lax.concatenate([margins[0], x, margins[1]], axis)
    return x


def _max_pool(x: Any, *, window_dimensions: Any, window_strides: Any, **_: Any) -> Any:
    """Pools by maxima of slices: jax2onnx pools over all axes, onnxruntime over three at most.

    No model pads or dilates windows.
    """
    for axis, (size, stride) in enumerate(zip(window_dimensions, window_strides, strict=True)):
        if size > 1:
            span = (x.shape[axis] - size) // stride * stride + 1
            slices = [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]
            x = functools.reduce(lax.max, slices)
    return x


# Operations that are computed in another way, by the name of their primitive.
_REPLACEMENTS: dict[str, Callable[..., Any]] = {"pad": _pad, "reduce_window_max": _max_pool}
