"""Gradients of a batch that is sharded over many devices, with explicit communication."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mixer_jax.distributed.sharding import DATA, FSDP, batch_sharding, state_sharding

Tree = Any
# Maps full parameters, the examples of one device and shared values to a mean and its gradient.
ValueAndGrad = Callable[[Tree, Tree, Tree], tuple[Array, Tree]]


def sharded_value_and_grad(
    value_and_grad: ValueAndGrad,
    mesh: Mesh,
    cast: Callable[[Tree], Tree],
    family: str,
) -> Callable[[Tree, Tree, Tree], tuple[Float[Array, ""], Tree]]:
    """Extends a function of the examples of one device to a batch that is sharded over all.

    Communication per step: parameters sharded over "fsdp" are gathered once. Their gradients are
    reduce-scattered over "fsdp", and the shards all-reduced over "data"; all other gradients are
    all-reduced over both. Sums are float32. The compiler's own partitioning sums in bfloat16,
    repeats it for every microbatch, and gathers activations instead of parameters.

    Args:
        value_and_grad: Mean over examples and its gradient; `mesh.size` parts of equal size form
            the batch.
        mesh: Mesh of `make_mesh`.
        cast: Conversion of parameters before they are sent.
        family: Family of the model, as for `state_sharding`.

    Returns:
        A function of parameters sharded by `state_sharding`, a batch sharded by `batch_sharding`,
        and values shared by all examples. Its gradients are float32, sharded like the parameters.
    """

    def per_device(shards: Tree, specs: Tree, examples: Tree, shared: Tree) -> tuple[Array, Tree]:
        params = jax.tree.map(_gather, cast(shards), specs)
        value, grads = value_and_grad(params, examples, shared)
        means = jax.tree.map(lambda grad, spec: _reduce(grad, spec) / mesh.size, grads, specs)
        return jax.lax.pmean(value, (DATA, FSDP)), means

    def compute(params: Tree, batch: Tree, shared: Tree) -> tuple[Float[Array, ""], Tree]:
        if mesh.size == 1:
            # Not every compiler removes collectives of one device.
            value, grads = value_and_grad(cast(params), batch, shared)
            return value, jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(params, mesh, family))
        mapped = jax.shard_map(
            lambda shards, examples, shared: per_device(shards, specs, examples, shared),
            mesh=mesh,
            in_specs=(specs, batch_sharding(mesh).spec, PartitionSpec()),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )
        return mapped(params, batch, shared)

    return compute


def _gather(shard: Array, spec: PartitionSpec) -> Array:
    if FSDP not in spec:
        return shard
    return jax.lax.all_gather(shard, FSDP, axis=spec.index(FSDP), tiled=True)


def _reduce(grad: Array, spec: PartitionSpec) -> Float[Array, "..."]:
    grad = grad.astype(jnp.float32)
    if FSDP not in spec:
        return jax.lax.psum(grad, (DATA, FSDP))
    axis = spec.index(FSDP)
    shard = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=axis, tiled=True)
    # Not every compiler removes an all-reduce over an axis of one device.
    return shard if jax.lax.axis_size(DATA) == 1 else jax.lax.psum(shard, DATA)
