"""Gradients of a batch that lies over many devices: what they send each other, and nothing else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mixer_jax.distributed.sharding import DATA, FSDP, batch_sharding, state_sharding

Tree = Any
# From whole parameters, rows and what is common to all rows, to a mean value and its gradient.
ValueAndGrad = Callable[[Tree, Tree, Tree], tuple[Array, Tree]]


def sharded_value_and_grad(
    value_and_grad: ValueAndGrad, mesh: Mesh, cast: Callable[[Tree], Tree]
) -> Callable[[Tree, Tree, Tree], tuple[Float[Array, ""], Tree]]:
    """Returns a function of a whole batch from one that each device applies to its own rows.

    What is sent: parameters that lie split over "fsdp" are gathered, once a step; their gradients
    are summed back into parts (reduce-scatter), and the parts summed over "data" (all-reduce); all
    other gradients are summed over both. Sums are float32. Left to itself, the compiler sums in
    bfloat16, for every piece of a batch anew, and gathers activations instead of parameters.

    Args:
        value_and_grad: a mean over the rows; `mesh.size` parts of equal size make the batch.
        mesh: from `make_mesh`.
        cast: to what parameters are turned before they are sent.

    Returns:
        A function of parameters and a batch that lie as `state_sharding` and `batch_sharding` say,
        and of what is common to all rows. Its gradients are float32 and lie as the parameters do.
    """

    def on_one_device(split: Tree, specs: Tree, rows: Tree, common: Tree) -> tuple[Array, Tree]:
        whole = jax.tree.map(_gather, cast(split), specs)
        value, grads = value_and_grad(whole, rows, common)
        means = jax.tree.map(lambda grad, spec: _sum(grad, spec) / mesh.size, grads, specs)
        return jax.lax.pmean(value, (DATA, FSDP)), means

    def on_all(params: Tree, batch: Tree, common: Tree) -> tuple[Float[Array, ""], Tree]:
        if mesh.size == 1:
            # Not every compiler sees that there is nobody to send anything to.
            value, grads = value_and_grad(cast(params), batch, common)
            return value, jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(params, mesh))
        mapped = jax.shard_map(
            lambda split, rows, common: on_one_device(split, specs, rows, common),
            mesh=mesh,
            in_specs=(specs, batch_sharding(mesh).spec, PartitionSpec()),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )
        return mapped(params, batch, common)

    return on_all


def _gather(part: Array, spec: PartitionSpec) -> Array:
    if FSDP not in spec:
        return part
    return jax.lax.all_gather(part, FSDP, axis=spec.index(FSDP), tiled=True)


def _sum(grad: Array, spec: PartitionSpec) -> Float[Array, "..."]:
    grad = grad.astype(jnp.float32)
    if FSDP not in spec:
        return jax.lax.psum(grad, (DATA, FSDP))
    axis = spec.index(FSDP)
    part = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=axis, tiled=True)
    # Not every compiler sees that there is nothing to sum.
    return part if jax.lax.axis_size(DATA) == 1 else jax.lax.psum(part, DATA)
