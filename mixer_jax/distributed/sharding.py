"""The device mesh, the sharding of batches and states, and gradients of a sharded batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mixer_jax.errors import UserError
from mixer_jax.models.family import ModelFamily
from mixer_jax.models.params import prepare_inference_params
from mixer_jax.models.registry import get_family

DATA, FSDP = "data", "fsdp"

Tree = Any
# Maps full parameters, the examples of one device and shared values to a mean and its gradient.
ValueAndGrad = Callable[[Tree, Tree, Tree], tuple[Array, Tree]]


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a mesh ("data", "fsdp") whose neighbors are neighbors in the hardware.

    With several TPU slices, the data axis is split over the slices, so only gradients cross the
    slower network between them.

    Args:
        data: Size of the data axis; 0: all devices that remain after `fsdp`.
        fsdp: Size of the axis over which weight matrices are sharded.
        devices: Devices of the mesh; None: the devices of all hosts.

    Raises:
        UserError: The number of devices is not data × fsdp, or fsdp does not divide a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    num_devices = len(devices)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    check_mesh(data, fsdp, num_devices, num_slices)
    # A mesh axis of 8 on 4×4×4 chips is not a product of torus dimensions: one of them is split.
    kwargs = {"allow_split_physical_axes": True}
    if num_slices == 1:
        shape = (num_devices // fsdp, fsdp)
        grid = mesh_utils.create_device_mesh(shape, devices, **kwargs)
    else:
        shape = (num_devices // num_slices // fsdp, fsdp)
        grid = mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1), devices, **kwargs)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def check_mesh(data: int, fsdp: int, num_devices: int, num_slices: int = 1) -> None:
    """Checks the axis sizes of a mesh, as `make_mesh` takes them.

    Raises:
        UserError: The number of devices is not data × fsdp, or fsdp does not divide a slice.
    """
    if num_devices % fsdp or (data and data * fsdp != num_devices):
        fix = f"Set mesh.fsdp to a divisor of {num_devices} and mesh.data to 0."
        if num_devices == 1:
            sizes = {"data": data, "fsdp": fsdp}
            flags = [f"--config.mesh.{name}" for name, size in sizes.items() if size > 1]
            fix = f"Remove {' and '.join(flags)}."
        raise UserError(
            f"mesh.data × mesh.fsdp must be the number of devices ({num_devices}), got data={data} "
            f"and fsdp={fsdp}. {fix}"
        )
    slice_size = num_devices // num_slices
    if slice_size % fsdp:
        raise UserError(
            f"mesh.fsdp must divide the {slice_size} devices of a slice, got {fsdp}. "
            f"Set it to a divisor of {slice_size}."
        )


def check_divisible(key: str, batch_size: int, num_devices: int, num_microbatches: int = 1) -> None:
    """Checks that each of `num_microbatches` splits evenly over the devices; messages name `key`.

    Raises:
        UserError: The batch size is not a multiple of devices × microbatches.
    """
    unit = num_devices * num_microbatches
    if batch_size % unit:
        lower = batch_size // unit * unit
        sizes = f"nearest valid sizes are {lower} and {lower + unit}"
        fix = sizes if lower else f"smallest valid size is {unit}"
        rule = f"the {num_devices} devices"
        if num_microbatches > 1:
            rule += f" × {num_microbatches} accumulation steps"
        raise UserError(f"{key} must be a multiple of {rule}, got {batch_size}. The {fix}.")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device stores a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicates arrays over all devices, inside a compiled function."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def state_sharding(tree: Any, mesh: Mesh, family: ModelFamily) -> Any:
    """Returns the shardings of a tree: weight matrices over "fsdp", all other arrays replicated.

    Optimizer moments have the path and shape of their parameter, and so the same sharding.
    """

    def shard(path: Any, array: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(array.shape)
        axis = fsdp_axis(array.shape, mesh)
        # Without the positions of parameters in the state.
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if axis is not None and names and family.is_fsdp_sharded(names):
            spec[axis] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(shard, tree)


def fsdp_axis(shape: tuple[int, ...], mesh: Mesh) -> int | None:
    """Returns the largest axis that "fsdp" divides, or None if there is none."""
    fsdp = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(shape) if size and size % fsdp == 0]
    if fsdp == 1 or not divisible:
        return None
    return max(divisible, key=lambda axis: shape[axis])


def sharded_value_and_grad(
    value_and_grad: ValueAndGrad,
    mesh: Mesh,
    cast: Callable[[Tree], Tree],
    family: ModelFamily,
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
        family: Family of the model.

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


def shard_params(params: Any, mesh: Mesh, family: ModelFamily) -> Any:
    """Shards parameters, the same on every host, over the mesh of all hosts, as in training."""

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, state_sharding(params, mesh, family))


def shard_inference_params(params: Any, model: Any, mesh: Mesh) -> Any:
    """Shards float32 parameters like `shard_params`, in the form that predicts fastest."""
    platform, family = mesh.devices.flat[0].platform, get_family(model.family)
    prepared = prepare_inference_params(params, model.execution.dtype, platform, family)
    return shard_params(prepared, mesh, family)
