"""Collectives of a compiled program: payload, mesh axis, and role of the tensors they carry."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.planning.hlo import ArrayType, Instruction, Program, parse_ints

# Devices, numbered row by row over the mesh.
ReplicaGroups = tuple[tuple[int, ...], ...]

_OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_REDUCTIONS = {"all-reduce", "reduce-scatter"}
# XLA's computation for an all-reduce of which each device keeps a slice.
_ALL_REDUCE_SCATTER = "all-reduce-scatter"
# A collective that overlaps with several fusions appears in each of them.
_OVERLAPPED = "async_collective_fusion_config"
# Between slices the hosts communicate, through the Megascale runtime.
_MEGASCALE_OP = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# Notations of replica groups.
_BRACES = r"\{((?:\s*\{[\d,\s]*\}\s*,?)*)\}"
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=" + _BRACES)
_PAIRS = re.compile(r"source_target_pairs=" + _BRACES)
_MESH_GROUPS = re.compile(
    r"replica_groups=(?:mesh)?\[([^\]]*)\](?:,\s*device_ids=\(([^)]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'?([\w]+)'?\s*=\s*(\d+)")
_USED_AXIS = re.compile(r"'?([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?")

GRADIENTS = "gradients"
PARAMETERS = "parameters"
MIXUP_EXAMPLES = "mixup examples"
SCALARS = "scalars"
ACTIVATIONS = "activations"

# Norms, losses, random keys. No array of a model is this small.
_MAX_SCALARS = 16
_TILE = (8, 128)


class Collective(NamedTuple):
    """Collectives with the same operation, dtype, mesh axis and tensor role.

    Attributes:
        op: Operation, e.g. "all-reduce".
        mesh_axis: Name of a mesh axis, "all" for both, "slices" between slices, or "other".
        tensor_role: Role of the tensors, one of the constants above.
        num_executions: Number per step.
        num_bytes: Payload per step and device: the whole array that is reduced, gathered, scattered
            or sent, not the traffic of the algorithm.
        replica_groups: Groups of communicating devices.
    """

    op: str
    dtype: str
    mesh_axis: str
    tensor_role: str
    num_executions: int
    num_bytes: float
    replica_groups: ReplicaGroups

    @property
    def is_unexpected(self) -> bool:
        """True if a data-parallel step should not need this."""
        return self.tensor_role == ACTIVATIONS


class TensorRoles:
    """Roles of tensors in collectives, inferred from their shapes.

    An inference can only be wrong if two tensors of a model have the same dimensions.

    Args:
        param_shapes: Shapes of the parameters, by path.
        fsdp: Number of devices that parameters are sharded over.
        example_shapes: Shapes of one example's image, label and targets.
        multi_slice: Whether there are several slices. Reductions between slices are cut into
            tiles, whose dimensions say nothing.
    """

    def __init__(
        self,
        param_shapes: Mapping[str, tuple[int, ...]],
        fsdp: int,
        example_shapes: Iterable[tuple[int, ...]],
        *,
        multi_slice: bool = False,
    ):
        full: set[tuple[int, ...]] = set()
        for path, shape in param_shapes.items():
            full.add(_canonical_dims(shape))
            if path.startswith("blocks/"):
                full.add(_canonical_dims(shape[1:]))
                # An unrolled scan splits its blocks into groups of equal size.
                groups = [n for n in range(2, shape[0]) if not shape[0] % n]
                full |= {_canonical_dims((n, shape[0] // n, *shape[1:])) for n in groups}
                full |= {_canonical_dims((n, *shape[1:])) for n in groups}
            if len(shape) > 2:
                full.add(_canonical_dims((math.prod(shape[:-1]), shape[-1])))
        shards = {
            _canonical_dims((*dims[:axis], size // fsdp, *dims[axis + 1 :]))
            for dims in full
            for axis, size in enumerate(dims)
            if size % fsdp == 0
        }
        self._param_dims = full | shards
        total = sum(math.prod(shape) for shape in param_shapes.values())
        # Parameters may be flattened, also all of them together.
        self._param_sizes = {math.prod(dims) for dims in self._param_dims}
        self._param_sizes |= {total, -(-total // fsdp)}
        # An example may be flattened, or have additional axes of size one.
        self._example_dims = {
            dims
            for shape in example_shapes
            for dims in (_canonical_dims(shape), (math.prod(shape),))
        }
        self._multi_slice = multi_slice

    def infer(self, op: str, array: ArrayType) -> str:
        """Infers the role of an operand of a collective."""
        dims = _canonical_dims(array.dims)
        if array.size <= _MAX_SCALARS and op != "collective-permute":
            return SCALARS
        if op == "collective-permute" and dims in self._example_dims:
            return MIXUP_EXAMPLES
        if self._multi_slice and array.dims[-2:] == _TILE:
            return GRADIENTS
        is_param = dims in self._param_dims or (
            len(dims) <= 1 and array.size in self._param_sizes and op in _REDUCTIONS
        )
        if not is_param:
            return ACTIVATIONS
        return GRADIENTS if op in _REDUCTIONS else PARAMETERS


def _canonical_dims(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def find_collectives(
    program: Program, mesh: dict[str, int], roles: TensorRoles, num_slices: int = 1
) -> list[Collective]:
    """Finds the collectives of a program, the largest first.

    Args:
        program: Compiled program; with several slices, the program of each slice.
        mesh: Sizes of the mesh axes by name, in the order in which the program numbers devices.
        roles: Roles of the tensors.
        num_slices: Number of slices, along the first mesh axis.
    """
    first, *others = mesh
    slice_mesh = {first: mesh[first] // num_slices} | {name: mesh[name] for name in others}
    found: dict[Any, Collective] = {}
    for instruction, num_executions in _iter_collectives(program):
        op = _collective_op(instruction)
        axis, groups = _mesh_axis_and_groups(instruction, op, slice_mesh, num_slices)
        if axis == "none":
            continue  # Each device communicates with itself alone.
        for (dtype, role), num_bytes in _payload(instruction, op, groups, roles).items():
            if not num_bytes:
                continue  # A token.
            key = (op, dtype, axis, role, groups)
            same = found.get(key, Collective(op, dtype, axis, role, 0, 0.0, groups))
            found[key] = same._replace(
                num_executions=same.num_executions + num_executions,
                num_bytes=same.num_bytes + num_executions * num_bytes,
            )
    return sorted(found.values(), key=lambda collective: -collective.num_bytes)


def _iter_collectives(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Yields each executed collective once, including those inside fusions."""
    overlapped: set[str] = set()
    for instruction, num_executions in program.executed_instructions():
        for inner in instruction.leaves():
            if not _collective_op(inner):
                continue
            if inner is not instruction and _OVERLAPPED in inner.attributes:
                identity = _overlapped_identity(inner)
                if identity in overlapped:
                    continue
                overlapped.add(identity)
            yield inner, num_executions


def _overlapped_identity(collective: Instruction) -> str:
    """Returns an identifier that all appearances of an overlapped collective share."""
    chain = re.search(r'chain_id="(\w+)"', collective.attributes)
    dims = [array.dims for array in collective.outputs]
    return f"{collective.int_attribute('channel_id')} {chain and chain.group(1)} {dims}"


def _collective_op(instruction: Instruction) -> str:
    """Returns the collective operation that an instruction starts, or ""."""
    if instruction.opcode == "send" and (match := _MEGASCALE_OP.search(instruction.attributes)):
        return match.group(1).lower().replace("_", "-")
    op = instruction.opcode.removesuffix("-start")
    if op not in _OPS:
        return ""
    is_scattered = instruction.computation.name.startswith(_ALL_REDUCE_SCATTER)
    return "reduce-scatter" if is_scattered else op


def _mesh_axis_and_groups(
    collective: Instruction, op: str, mesh: dict[str, int], num_slices: int
) -> tuple[str, ReplicaGroups]:
    """Returns the mesh axis that a collective runs along, and its groups of devices."""
    attributes, size = collective.attributes, math.prod(mesh.values())
    if collective.opcode == "send":
        return "slices", (tuple(range(0, size * num_slices, size)),)
    if op == "collective-permute":
        pairs = parse_source_target_pairs(attributes)
        return mesh_axis_of(pairs, mesh, pairs=True), pairs
    groups = parse_replica_groups(attributes, size)
    return mesh_axis_of(groups, mesh), groups


def _payload(
    collective: Instruction, op: str, groups: ReplicaGroups, roles: TensorRoles
) -> dict[tuple[str, str], float]:
    """Returns the bytes of one execution of a collective, by dtype and tensor role."""
    num_shards = len(groups[0]) if op == "all-gather" else 1
    arrays = [array for operand in collective.operands for array in operand.outputs]
    if op in _REDUCTIONS and len(collective.outputs) == len(arrays):
        # TPUs reduce in the dtype of the result, not of the operands.
        pairs = zip(arrays, collective.outputs, strict=True)
        arrays = [array._replace(dtype=output.dtype) for array, output in pairs]
    payload: defaultdict[tuple[str, str], float] = defaultdict(float)
    for array in arrays:
        payload[array.dtype, roles.infer(op, array)] += num_shards * array.num_bytes
    return payload


def parse_replica_groups(attributes: str, num_devices: int) -> ReplicaGroups:
    """Parses the groups of devices of a collective, in any notation of XLA.

    Args:
        attributes: Attributes of the instruction.
        num_devices: Devices of the program, which form one group if no groups are given.
    """
    if match := _LISTED_GROUPS.search(attributes):
        return _parse_listed_groups(match.group(1)) or (tuple(range(num_devices)),)
    if match := _IOTA_GROUPS.search(attributes):
        sizes, dims, permutation = match.groups()
        return _to_groups(_transposed_iota(dims, permutation), parse_ints(sizes)[-1])
    if match := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*match.groups())
    return (tuple(range(num_devices)),)


def parse_source_target_pairs(attributes: str) -> ReplicaGroups:
    """Parses the (source, target) pairs of a collective-permute."""
    match = _PAIRS.search(attributes)
    return _parse_listed_groups(match.group(1)) if match else ()


def mesh_axis_of(groups: ReplicaGroups, mesh: dict[str, int], *, pairs: bool = False) -> str:
    """Returns the mesh axis along which groups communicate: its name, "all", "other" or "none".

    Args:
        groups: Groups of devices, or pairs of them.
        mesh: Sizes of the mesh axes by name, the last varying fastest.
        pairs: Whether the groups are pairs; a ring over the whole mesh runs along "all".
    """
    sizes = tuple(mesh.values())
    crossed = {
        axis
        for group in groups
        for axis, coordinates in enumerate(np.unravel_index(group, sizes))
        if np.ptp(coordinates)
    }
    if not crossed:
        return "none"
    group_size = math.prod(sizes[axis] for axis in crossed)
    if not pairs and any(len(group) != group_size for group in groups):
        return "other"
    if len(crossed) == 1:
        return list(mesh)[crossed.pop()]
    return "all"


def _mesh_groups(axes: str, device_ids: str | None, used: str) -> ReplicaGroups:
    """Returns the groups along axes of a mesh, or along parts of axes, `name:(before)size`."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    # Each axis becomes three: before the used part, the used part, and the rest.
    splits = {name: (1, size, 1) for name, size in sizes.items()}
    used_axes = []
    for name, before, part in _USED_AXIS.findall(used):
        if before:
            splits[name] = (int(before), int(part), sizes[name] // int(before) // int(part))
        used_axes.append(3 * list(sizes).index(name) + 1)
    shape = [size for name in sizes for size in splits[name]]
    other_axes = [axis for axis in range(len(shape)) if axis not in used_axes]
    devices = _mesh_devices(device_ids, math.prod(shape)).reshape(shape)
    group_size = math.prod(shape[axis] for axis in used_axes)
    return _to_groups(devices.transpose(*other_axes, *used_axes), group_size)


def _mesh_devices(device_ids: str | None, num_devices: int) -> np.ndarray:
    """Returns the devices of a mesh row by row from `[8]`, `[4,2]T(1,0)`, a list, or nothing."""
    if match := re.search(r"\[([\d,]+)\]T\(([\d,]+)", device_ids or ""):
        return _transposed_iota(*match.groups())
    listed = parse_ints((device_ids or "").strip("[]"))
    return np.array(listed) if len(listed) == num_devices else np.arange(num_devices)


def _transposed_iota(shape: str, permutation: str | None) -> np.ndarray:
    """Returns the numbers 0, 1, 2, … in an array of this shape, transposed."""
    sizes = parse_ints(shape)
    iota = np.arange(math.prod(sizes)).reshape(sizes)
    return iota.transpose(parse_ints(permutation)) if permutation else iota


def _to_groups(devices: np.ndarray, group_size: int) -> ReplicaGroups:
    return tuple(map(tuple, devices.reshape(-1, group_size).tolist()))


def _parse_listed_groups(text: str) -> ReplicaGroups:
    return tuple(parse_ints(group) for group in re.findall(r"\{([\d,\s]*)\}", text))
