"""Training steps compiled for TPUs, and errors about programs that do not fit into memory."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.planning.aot_compile import (
    Compiled,
    OutOfMemory,
    build_for_topology,
    compile_function,
    parse_oom,
)
from mixer_jax.planning.topology import GIB, parse_topology, tpu_devices
from tests.helpers.messages import raises
from tests.helpers.tpu_compiler import tpu_compiler

PREFIX = "RESOURCE_EXHAUSTED: "


@pytest.mark.parametrize(
    ("message", "needed_gib", "excludes_arguments"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (34.87G) "
            "exceeds available HBM (15.75G).",
            34.87,
            True,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.08G "
            "of 15.75G hbm. Exceeds hbm capacity by 1.33G.",
            17.08,
            False,
        ),
    ],
)
def test_parse_oom(message: str, needed_gib: float, excludes_arguments: bool) -> None:
    oom = parse_oom(RuntimeError(PREFIX + message), 3.0)
    assert oom == OutOfMemory(3.0, needed_gib * GIB, 15.75 * GIB, "", excludes_arguments)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space vmem. Used 17.08M of 16.00M vmem. Exceeded vmem "
        "capacity by 1.08M.",
        "A message that is not known.",
    ],
)
def test_parse_oom_keeps_other_messages(message: str) -> None:
    oom = parse_oom(RuntimeError(PREFIX + message), 3.0)
    # Without its full stop, since the message becomes part of a sentence.
    assert oom == OutOfMemory(3.0, None, 0.0, PREFIX + message.removesuffix("."), False)


def test_parse_oom_raises_other_errors() -> None:
    with raises(RuntimeError, "broken"):
        parse_oom(RuntimeError("INTERNAL: broken"), 0.0)


@pytest.mark.slow
def test_vit_with_dropout_compiles_with_float32_softmax() -> None:
    flags = ["batch_size=64", "eval_batch_size=64", "mesh.fsdp=4", "recipe.grad_accum_steps=1"]
    overrides = [f"--config.{flag}" for flag in flags]
    config = parse(load_config_with_overrides("configs/vit_b16_i1k.py:vit", overrides))
    with tpu_compiler():
        experiment = build_for_topology(config, tpu_devices(parse_topology("v4:2x2x1")))
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(experiment.mesh))
            for name, shape, dtype in (
                ("image", (64, 224, 224, 3), jnp.uint8),
                ("label", (64,), jnp.int32),
            )
        }
        step: Any = experiment.train_step
        shapes = experiment.state_shape, batch, experiment.hyperparams
        text = step.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
        compiled = compile_function(step, *shapes, fast_compile=True)
    model = experiment.model
    assert (model.dropout, model.execution.dtype) == (0.1, "bfloat16")
    # 196 patches and the class token attend to each other. This is read from the program before
    # compilation, because a TPU v4 computes exponentials of bfloat16 values in float32 as well.
    exponentials = re.findall(r"exponential %\S+ : tensor<\S*x197x197x(\w+)>", text)
    assert set(exponentials) == {"f32"}
    assert isinstance(compiled, Compiled)
    assert 0 < compiled.total_bytes < 4 * GIB
