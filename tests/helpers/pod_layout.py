"""Dry run of a pod: the examples that each host loads, and the bytes that it writes and reads.

    JAX_NUM_CPU_DEVICES=1024 python -m tests.helpers.pod_layout FSDP

Every device of this process stands for a host with one device. Nothing is trained or written: the
functions that plan the work of a host are called once for each.
"""

import json
import math
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint._src.serialization.replica_slices import get_replica_slices

from mixer_jax.checkpoints.weights import unflatten_params
from mixer_jax.data.loader import Chunks, _local_rows
from mixer_jax.data.readers import shuffled_indices
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import batch_sharding, make_mesh, state_sharding
from mixer_jax.models.registry import get_family

VARIANT, NUM_CLASSES = "L/16", 21_843
BATCH_SIZE, NUM_STEPS = 4096, 3

Index = tuple[slice, ...]
# Start and stop along each axis.
Bounds = tuple[tuple[int, int], ...]


class _HostSharding(NamedTuple):
    """Sharding as one host sees it."""

    sharding: NamedSharding
    device: jax.Device

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> Mapping[Any, Index]:
        return {self.device: self.sharding.devices_indices_map(shape)[self.device]}


def plan_examples(mesh: Mesh) -> dict[str, Any]:
    """Lists the examples of one epoch on all hosts, and the sizes of their batches."""
    source = Source("test", range(BATCH_SIZE * NUM_STEPS), ("",))
    indices = shuffled_indices(source, seed=0)
    examples, sizes = [], set()
    for device in mesh.devices.flat:
        local: Any = _HostSharding(batch_sharding(mesh), device)
        chunks = Chunks(range(NUM_STEPS), _local_rows(local, BATCH_SIZE), BATCH_SIZE)
        sizes |= {sum(len(c.positions) for c in chunks if c.step == s) for s in range(NUM_STEPS)}
        examples += [indices[position] for c in chunks for position in c.positions.tolist()]
    return {"examples": examples, "rows": sorted(sizes)}


def plan_checkpoint(mesh: Mesh) -> dict[str, Any]:
    """Adds up what each host writes and reads, in bytes, and counts writes of each element."""
    family = get_family("mixer")
    config = family.variants[VARIANT]
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, shape in family.param_shapes(config, 224, NUM_CLASSES).items()
    }
    shardings = state_sharding(unflatten_params(shapes), mesh, family)
    written, read = np.zeros(mesh.size, np.int64), np.zeros(mesh.size, np.int64)
    wrong = []
    leaves = jax.tree_util.tree_leaves_with_path(unflatten_params(shapes))
    for (path, array), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shards = _shards(array, sharding)
        read += [shard.data.size * array.dtype.itemsize for shard in shards]
        # What orbax reads of an array. It decides about each shard on its own.
        planned: Any = SimpleNamespace(
            sharding=sharding,
            shape=array.shape,
            dtype=array.dtype,
            itemsize=array.dtype.itemsize,
            ndim=len(array.shape),
            addressable_shards=shards,
        )
        slices = []
        parts = get_replica_slices(planned, replica_id=0, use_replica_parallel=True)
        for part in parts.replica_slices:
            bounds = _bounds(part.index, array.shape)
            slices.append(bounds)
            size = math.prod(stop - start for start, stop in bounds)
            written[part.unsliced_data.host] += size * array.dtype.itemsize
        if not _is_tiling(slices, array.shape):
            wrong.append(jax.tree_util.keystr(path))
    return {
        "bytes": 4 * family.num_params(config, 224, NUM_CLASSES),
        "written": written.tolist(),
        "read": read.tolist(),
        "wrong": wrong,
    }


def _shards(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> list[Any]:
    """Describes the shard of each device, with the number of equal ones before it."""
    shards = []
    seen: dict[Bounds, int] = {}
    by_device = sharding.devices_indices_map(array.shape)
    for host, device in enumerate(sharding.mesh.devices.flat):
        index = by_device[device]
        bounds = _bounds(index, array.shape)
        shape = tuple(stop - start for start, stop in bounds)
        data = SimpleNamespace(shape=shape, size=math.prod(shape), host=host)
        shards.append(SimpleNamespace(index=index, replica_id=seen.get(bounds, 0), data=data))
        seen[bounds] = seen.get(bounds, 0) + 1
    return shards


def _bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(
        (s.start or 0, n if s.stop is None else s.stop) for s, n in zip(index, shape, strict=True)
    )


def _is_tiling(slices: list[Bounds], shape: tuple[int, ...]) -> bool:
    """Checks that parts of an array are the cells of a grid, and that each cell occurs once."""
    cell = tuple(stop - start for start, stop in slices[0])
    is_grid = all(
        stop - start == size and start % size == 0
        for part in slices
        for (start, stop), size in zip(part, cell, strict=True)
    )
    count = math.prod(n // size for n, size in zip(shape, cell, strict=True))
    is_divided = all(n % size == 0 for n, size in zip(shape, cell, strict=True))
    return is_grid and is_divided and len(slices) == len(set(slices)) == count


if __name__ == "__main__":
    pod = make_mesh(0, int(sys.argv[1]))
    print(json.dumps(plan_examples(pod) | plan_checkpoint(pod)))
