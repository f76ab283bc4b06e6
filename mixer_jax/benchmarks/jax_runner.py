"""Candidates in JAX: mixer_jax as `mixer_jax.main` and `Classifier` run it, and the reference."""

import functools
import importlib
import math
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixer_jax.benchmarks.candidates import (
    MIXER_JAX,
    OPTIMIZER,
    Candidate,
    Workload,
    find_reference,
)
from mixer_jax.benchmarks.runner import CompileCosts, FrameworkRunner, Step
from mixer_jax.config.schema import ModelConfig, RecipeConfig
from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.models.layers import normalize_images, select_dot_general
from mixer_jax.models.params import cast_weights, prepare_inference_params
from mixer_jax.models.registry import build_model, resolve_dtype
from mixer_jax.training.optimizer import make_optimizer, make_schedule, weight_decay_mask
from mixer_jax.training.step import Hyperparams, create_state, jit_train_step, train_step


class StepFunction(NamedTuple):
    """Step of a candidate before it is compiled.

    Attributes:
        function: Jitted function of state and batch.
        init_state: Function that is evaluated for the shapes of the state only.
        updates_state: Whether the function returns the next state as its first result.
        args: Arguments that follow state and batch.
    """

    function: Any
    init_state: Callable[[], Any]
    updates_state: bool
    args: tuple[Any, ...] = ()


class JaxRunner(FrameworkRunner):
    """JAX on its first device."""

    def __init__(self, workload: Workload, devices: Sequence[Any] | None = None):
        self.device = (devices or jax.devices())[0]
        super().__init__(workload, asynchronous=self.device.platform != "cpu")

    def environment(self) -> dict[str, str]:
        """Returns the device, the dtype of the workload and the versions of the libraries."""
        return {
            "device": self.device.device_kind,
            "platform": self.device.platform,
            "dtype": str(resolve_dtype(self.workload.dtype)),
            "jax": jax.__version__,
            "flax": metadata.version("flax"),
        }

    def build(
        self, candidate: Candidate, batch_sizes: Sequence[int]
    ) -> tuple[list[Step], CompileCosts]:
        """Builds and runs one step per batch size; returns the costs of the first."""
        step = make_step(candidate, self.workload, self.device)
        # Inference does not donate its parameters, so all programs can share them.
        state = synthetic_state(jax.eval_shape(step.init_state), self.device)
        compiled = [self._compile(step, state, batch_size) for batch_size in batch_sizes]
        return [run_step for run_step, _ in compiled], compiled[0][1]

    def build_matmul(self) -> tuple[Step, int]:
        """Builds a matmul of random matrices, in the form that is fastest on this device."""
        size = 8192 if self.asynchronous else 4096
        dtype = resolve_dtype(self.workload.dtype)
        keys = jax.random.split(jax.random.key(2))
        left, right = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
        left, right = left.astype(dtype), right.astype(dtype)
        # On CPUs as the model computes its matmuls in inference.
        dot = select_dot_general(self.device.platform == "cpu", train=False) or jax.lax.dot_general
        dimensions = (((1,), (0,)), ((), ()))
        matmul = jax.jit(lambda x, y: dot(x, y, dimensions)).lower(left, right).compile()
        return lambda: matmul(left, right), 2 * size**3

    def wait(self, value: Any) -> None:
        """Waits until the step's result is computed."""
        jax.block_until_ready(value)

    def release_memory(self) -> None:
        """Does nothing: JAX keeps its memory."""

    def write_trace(self, candidate: Candidate, folder: str) -> None:
        """Writes a profile of three steps of a candidate."""
        self.measure_step(candidate)
        step = self._steps[candidate.name, self.workload.batch_size].step
        with jax.profiler.trace(folder):
            for _ in range(3):
                with jax.profiler.StepTraceAnnotation(self.workload.mode):
                    value = step()
            self.wait(value)

    def _compile(
        self, step: StepFunction, state: Any, batch_size: int
    ) -> tuple[Step, CompileCosts]:
        batch = synthetic_batch(self.workload, batch_size, self.device)
        args = jax.device_put(step.args, self.device)
        self.wait((state, batch, args))
        start = time.perf_counter()
        lowered = step.function.lower(state, batch, *step.args)
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()

        def run_step() -> Any:
            nonlocal state
            if not step.updates_state:
                return compiled(state, batch, *args)
            state, value = compiled(state, batch, *args)
            return value

        self.wait(run_step())
        first_step_seconds = time.perf_counter() - start
        memory, memory_bytes = compiled.memory_analysis(), None
        if memory is not None:
            memory_bytes = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
            )
        return run_step, CompileCosts(compiled_at - lowered_at, first_step_seconds, memory_bytes)


def synthetic_batch(workload: Workload, batch_size: int, device: Any) -> dict[str, jax.Array]:
    """Creates random images and labels on one device."""
    rng, size = np.random.default_rng(1), workload.image_size
    images = rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)
    labels = rng.integers(0, workload.num_classes, (batch_size,), np.int32)
    return jax.device_put({"image": images, "label": labels}, device)


def synthetic_state(shapes: Any, device: Any) -> Any:
    """Creates parameters and optimizer moments on one device, faster than the model's initializers.

    All kernels are random, including the head's, so that every parameter changes from the first
    step on.
    """
    rng = np.random.default_rng(0)

    def create(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        values = np.zeros(shape.shape, np.float32)
        if "mu" not in names and "nu" not in names:
            if names[-1] == "kernel":
                # The first axis of stacked parameters is that of blocks.
                fan_in = math.prod(shape.shape["blocks" in names : -1])
                values = rng.standard_normal(shape.shape, np.float32) / math.sqrt(fan_in)
            elif names[-1] == "scale":
                values = np.ones(shape.shape, np.float32)
        return jax.device_put(values.astype(shape.dtype), device)

    return jax.tree_util.tree_map_with_path(create, shapes)


def make_step(candidate: Candidate, workload: Workload, device: Any) -> StepFunction:
    """Makes the step of a candidate, to be compiled for one device."""
    if candidate.implementation == MIXER_JAX:
        model = _our_model(candidate, workload, device)
        if workload.mode == "train":
            return _our_train_step(model, workload, device)
        prepare_params = functools.partial(
            prepare_inference_params,
            dtype=model.execution.dtype,
            platform=device.platform,
            family=workload.family,
        )
        options = compiler_options(device.platform, model.execution.backend)
        return _infer_step(model, workload, prepare_params, options)
    dtype = resolve_dtype(workload.dtype)
    reference_class = importlib.import_module(find_reference(workload.family) or "").Reference
    reference = reference_class(workload.config, workload.num_classes, dtype)
    if workload.mode == "train":
        return _plain_train_step(reference, workload)
    prepare_params = functools.partial(cast_weights, dtype=dtype, family=workload.family)
    return _infer_step(reference, workload, prepare_params)


def _our_model(candidate: Candidate, workload: Workload, device: Any) -> Any:
    family, variant = workload.family, workload.variant
    settings: dict[str, Any] = {
        "family": family.name,
        "variant": variant,
        "dtype": workload.dtype,
    }
    declared = ModelConfig(**settings, **candidate.overrides)
    model = (family, declared.architecture, workload.num_classes)
    return build_model(*model, declared.settings, device.platform, device.device_kind)


def _our_train_step(model: Any, workload: Workload, device: Any) -> StepFunction:
    """Makes the training step as `training.setup` does, on one device."""
    schedule_by_peak = functools.partial(make_schedule, OPTIMIZER, 1000)
    make_tx = functools.partial(make_optimizer, OPTIMIZER, family=workload.family)
    mesh = make_mesh(1, 1, [device])
    tx = make_tx(schedule_by_peak())
    init_state = functools.partial(create_state, 0, model, tx, workload.image_size, ema=False)
    sharding = state_sharding(jax.eval_shape(init_state), mesh, workload.family)
    step = functools.partial(
        train_step,
        recipe=RecipeConfig(),
        model=model,
        make_schedule=schedule_by_peak,
        make_tx=make_tx,
        mesh=mesh,
    )
    function = jit_train_step(step, sharding, mesh, model)
    hyperparams = Hyperparams(np.float32(OPTIMIZER.learning_rate), np.uint32(0))
    return StepFunction(function, init_state, True, (hyperparams,))


def _plain_train_step(model: Any, workload: Workload) -> StepFunction:
    """Makes a straightforward training step with optax's own AdamW."""
    tx = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(
            OPTIMIZER.learning_rate,
            OPTIMIZER.b1,
            OPTIMIZER.b2,
            OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            mask=functools.partial(weight_decay_mask, family=workload.family),
        ),
    )

    def step(state: Any, batch: dict[str, Any]) -> Any:
        def loss_fn(params: Any) -> Any:
            logits = model.apply({"params": params}, normalize_images(batch["image"]))
            labels = jax.nn.one_hot(batch["label"], workload.num_classes)
            return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1).mean()

        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    def init_state() -> Any:
        params = _init_params(model, workload)
        return params, tx.init(params)

    return StepFunction(jax.jit(step, donate_argnums=0), init_state, True)


def _infer_step(
    model: Any,
    workload: Workload,
    prepare_params: Callable[[Any], Any],
    options: dict[str, Any] | None = None,
) -> StepFunction:
    """Makes the step from images to logits; parameters are prepared once, as at load."""

    def classify(params: Any, batch: dict[str, Any]) -> Any:
        return model.apply({"params": params}, normalize_images(batch["image"]))

    def init_params() -> Any:
        return prepare_params(_init_params(model, workload))

    return StepFunction(jax.jit(classify, compiler_options=options), init_params, False)


def _init_params(model: Any, workload: Workload) -> Any:
    size = workload.image_size
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
