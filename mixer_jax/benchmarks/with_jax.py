"""Ours and the reference, in JAX: the training step as runs take it, and the plain one."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixer_jax.benchmarks.contestants import (
    B1,
    B2,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    OURS,
    WEIGHT_DECAY,
    Contestant,
    Setting,
)
from mixer_jax.benchmarks.made_up import make_batch, make_state
from mixer_jax.benchmarks.reference import ReferenceMixer
from mixer_jax.benchmarks.side import Costs, Program, Side
from mixer_jax.config.schema import FIELDS, OptimizerConfig, RecipeConfig
from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.models.layers import normalize_images, select_dot_general
from mixer_jax.models.mixer_config import get_config
from mixer_jax.models.params import cast_weights, prepare_inference_params
from mixer_jax.models.registry import from_config, resolve_dtype
from mixer_jax.training.optimizer import make_optimizer, make_schedule, weight_decay_mask
from mixer_jax.training.step import TrainStepConfig, create_state, jit_train_step

# Without warmup, so that parameters change from the first step on.
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE,
    warmup_steps=0,
    decay_type="none",
    weight_decay=WEIGHT_DECAY,
    b1=B1,
    b2=B2,
    eps=EPS,
    clip_norm=CLIP_NORM,
)


class Work(NamedTuple):
    """A contestant's step before it is compiled.

    Attributes:
        function: jitted, from state and batch.
        make_state: makes the first argument, for its shapes.
        has_state: whether the function returns the next state, before all else.
    """

    function: Any
    make_state: Callable[[], Any]
    has_state: bool


class JaxSide(Side):
    """JAX on its first device."""

    def __init__(self, setting: Setting, devices: Sequence[Any] | None = None):
        self.device = (devices or jax.devices())[0]
        super().__init__(setting, asynchronous=self.device.platform != "cpu")

    def facts(self) -> dict[str, str]:
        """Returns the device and the versions."""
        return {
            "device": self.device.device_kind,
            "platform": self.device.platform,
            "dtype": str(resolve_dtype(self.setting.dtype)),
            "jax": jax.__version__,
            "flax": metadata.version("flax"),
        }

    def make(self, contestant: Contestant, alone: bool) -> tuple[Program, Costs]:
        """Makes a contestant's program and takes its first step."""
        work = make_work(contestant, self.setting, self.device)
        state = make_state(jax.eval_shape(work.make_state), self.device)
        # What takes one image takes a state that is not used up.
        one = self._compile(work, state, 1)[0] if alone else None
        step, costs = self._compile(work, state, self.setting.batch_size)
        return Program(step, one), costs

    def make_product(self) -> tuple[Program, int]:
        """Makes a matrix product of random numbers, as it is fastest here."""
        side = 8192 if self.asynchronous else 4096
        dtype = resolve_dtype(self.setting.dtype)
        keys = jax.random.split(jax.random.key(2))
        left, right = (jax.random.normal(key, (side, side), jnp.float32) for key in keys)
        left, right = left.astype(dtype), right.astype(dtype)
        # On CPUs as the model has it computed where it predicts.
        dot = select_dot_general(self.device.platform == "cpu", train=False) or jax.lax.dot_general
        dimensions = (((1,), (0,)), ((), ()))
        product = jax.jit(lambda x, y: dot(x, y, dimensions)).lower(left, right).compile()
        return Program(lambda: product(left, right), None), 2 * side**3

    def wait(self, value: Any) -> None:
        """Waits until what a step returned is there."""
        jax.block_until_ready(value)

    def rest(self) -> None:
        """Does nothing: JAX keeps the memory it has."""

    def profile(self, name: str, folder: str) -> None:
        """Writes a trace of a few steps of a contestant."""
        step = self._programs[name].step
        self.wait(step())
        with jax.profiler.trace(folder):
            for _ in range(3):
                with jax.profiler.StepTraceAnnotation(self.setting.mode):
                    value = step()
            self.wait(value)

    def _compile(self, work: Work, state: Any, count: int) -> tuple[Callable[[], Any], Costs]:
        batch = make_batch(self.setting, count, self.device)
        self.wait((state, batch))
        start = time.perf_counter()
        lowered = work.function.lower(state, batch)
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()

        def take_step() -> Any:
            nonlocal state
            if not work.has_state:
                return compiled(state, batch)
            state, value = compiled(state, batch)
            return value

        self.wait(take_step())
        first = time.perf_counter() - start
        return take_step, Costs(compiled_at - lowered_at, first, memory_of(compiled))


def memory_of(compiled: Any) -> int | None:
    """Returns the bytes of a program's arguments, results and all between, by the compiler."""
    size = compiled.memory_analysis()
    if size is None:
        return None
    return (
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
    )


def make_work(contestant: Contestant, setting: Setting, device: Any) -> Work:
    """Returns what a contestant does, before it is compiled.

    Args:
        contestant: ours or the reference.
        setting: the work.
        device: to do it on.
    """
    if contestant.kind == OURS:
        defaults = {path: key.default for path, key in FIELDS.items() if path.startswith("model.")}
        section = {
            **{path.removeprefix("model."): value for path, value in defaults.items()},
            "variant": setting.variant,
            "dtype": setting.dtype,
            "scan_unroll": contestant.unroll,
            "remat": contestant.remat,
            **dict(contestant.others),
        }
        model: Any = from_config(section, setting.num_classes, device.device_kind)
    else:
        widths = dataclasses.asdict(get_config(setting.variant))
        dtype = resolve_dtype(setting.dtype)
        model = ReferenceMixer(num_classes=setting.num_classes, dtype=dtype, **widths)
    if setting.mode == "infer":
        return (
            _our_inference(model, setting, device)
            if contestant.kind == OURS
            else _inference(model, setting)
        )
    if contestant.kind == OURS:
        return _our_training(model, setting, device)
    return _plain_training(model, setting)


def _our_training(model: Any, setting: Setting, device: Any) -> Work:
    """Returns the training step as `training.experiment` builds it, on one device."""
    schedule = make_schedule(OPTIMIZER, num_steps=1000)
    tx = make_optimizer(OPTIMIZER, schedule)
    mesh = make_mesh(1, 1, [device])
    first_state = functools.partial(
        create_state, jax.random.key(0), model, tx, setting.image_size, ema=False
    )
    sharding = state_sharding(jax.eval_shape(first_state), mesh)
    config = TrainStepConfig(RecipeConfig())
    function = jit_train_step(config, sharding, model, tx, schedule, mesh)
    return Work(function, first_state, True)


def _plain_training(model: Any, setting: Setting) -> Work:
    """Returns the training step as one writes it first, with optax's own AdamW."""
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY, mask=weight_decay_mask),
    )

    def step(state: Any, batch: dict[str, Any]) -> Any:
        def loss_fn(params: Any) -> Any:
            logits = model.apply({"params": params}, normalize_images(batch["image"]))
            labels = jax.nn.one_hot(batch["label"], setting.num_classes)
            return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1).mean()

        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    def first_state() -> Any:
        params = _init(model, setting)
        return params, tx.init(params)

    return Work(jax.jit(step, donate_argnums=0), first_state, True)


def _our_inference(model: Any, setting: Setting, device: Any) -> Work:
    """Returns the way from images to logits as `Classifier` takes it."""
    options = compiler_options(device.platform, model.execution.backend)
    return _inference(model, setting, options, device.platform)


def _inference(
    model: Any,
    setting: Setting,
    options: dict[str, Any] | None = None,
    platform: str = "",
) -> Work:
    """Returns the way from images to logits; parameters are ours, for a platform, or plain."""

    def classify(params: Any, batch: dict[str, Any]) -> Any:
        return model.apply({"params": params}, normalize_images(batch["image"]))

    def first_params() -> Any:
        params = _init(model, setting)
        if platform:
            return prepare_inference_params(params, model.execution.dtype, platform)
        return cast_weights(params, model.execution.dtype)

    return Work(jax.jit(classify, compiler_options=options), first_params, False)


def _init(model: Any, setting: Setting) -> Any:
    size = setting.image_size
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
