"""Steps compiled for a TPU that is not here."""

from typing import Any

import jax
import jax.numpy as jnp

from mixer_jax.benchmarks.contestants import Contestant, Setting
from mixer_jax.benchmarks.traffic_rows import Step, make_step
from mixer_jax.benchmarks.with_jax import make_work
from mixer_jax.distributed.sharding import make_mesh, replicated
from mixer_jax.planning.aot_compile import Compiled, OutOfMemory, compile_function
from mixer_jax.planning.hlo.attribution import sum_by_region
from mixer_jax.planning.hlo.flops import iter_matmul_flops
from mixer_jax.planning.hlo.traffic import iter_hbm_bytes
from mixer_jax.planning.mixer_costs import REGIONS
from mixer_jax.planning.topology import GIB, Topology


def compile_step(
    contestant: Contestant, setting: Setting, device: Any, *, quick: bool = False
) -> Compiled | OutOfMemory:
    """Compiles a contestant's step for a device that is not here.

    Args:
        contestant: ours or the reference.
        setting: the work.
        device: from `tpu_devices`.
        quick: whether to compile for less long and so to a somewhat slower program.
    """
    work = make_work(contestant, setting, device)
    lies = replicated(make_mesh(1, 1, [device]))
    count, side = setting.batch_size, setting.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    state, batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=lies),
        (jax.eval_shape(work.make_state), batch),
    )
    return compile_function(work.function, state, batch, fast_compile=quick)


def read_step(
    name: str, compiled: Compiled | OutOfMemory, setting: Setting, topology: Topology
) -> Step:
    """Returns what a compiled step takes.

    Args:
        name: of the contestant.
        compiled: its step.
        setting: the work.
        topology: that it is compiled for.
    """
    if isinstance(compiled, OutOfMemory):
        return _too_large(name, compiled, topology)
    program = compiled.program
    num_bytes, flops = (
        sum_by_region(program, iter_hbm_bytes(program), REGIONS),
        sum_by_region(program, iter_matmul_flops(program), REGIONS),
    )
    return make_step(name, num_bytes, flops, setting.batch_size, topology)._replace(
        temporary_bytes=compiled.temporary_bytes,
        compile_seconds=compiled.compile_seconds,
        uncounted_loops=len(program.unknown_trip_count_loops()),
    )


def _too_large(name: str, refused: OutOfMemory, topology: Topology) -> Step:
    said = refused.message
    if refused.needed_bytes is not None:
        allowed = (refused.available_bytes or topology.hbm_bytes) / GIB
        what = ", without state and batch" if refused.excludes_arguments else ""
        said = f"{refused.needed_bytes / GIB:.2f} GiB of {allowed:.2f}{what}"
    failed = f"too large, {said}"
    return Step(name, failed, {}, {}, 0.0, 0.0, compile_seconds=refused.compile_seconds)
