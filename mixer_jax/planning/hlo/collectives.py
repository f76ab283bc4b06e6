"""Collectives of a compiled program: payload, mesh axis, and role of the tensors they carry."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mixer_jax.planning.hlo.program import (
    ArrayType,
    Computation,
    ExecutedInstruction,
    Instruction,
    Program,
)

# Devices, numbered row by row over the mesh.
ReplicaGroups = tuple[tuple[int, ...], ...]

OPS = (
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
        dtype: Element type.
        mesh_axis: Name of a mesh axis, "all" for both, "slices" between slices, or "other".
        tensor_role: Role of the tensors, one of the constants above.
        num_executions: Number of executions per step.
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


class TensorRoles(NamedTuple):
    """Roles of tensors in collectives, inferred from their shapes.

    An inference can only be wrong if two tensors of a model have the same dimensions.

    Attributes:
        param_dims: Sorted dimensions, without ones, of parameters, their shards and blocks.
        param_sizes: Number of elements of the same, for flattened arrays.
        example_dims: Dimensions of one example of a batch.
        multi_slice: Whether there are several slices. Reductions between slices are cut into
            tiles, whose dimensions say nothing.
    """

    param_dims: frozenset[tuple[int, ...]]
    param_sizes: frozenset[int]
    example_dims: frozenset[tuple[int, ...]]
    multi_slice: bool = False

    @classmethod
    def from_shapes(
        cls,
        param_shapes: Mapping[str, tuple[int, ...]],
        fsdp: int,
        example_shapes: Iterable[tuple[int, ...]],
        *,
        multi_slice: bool = False,
    ) -> "TensorRoles":
        """Derives the roles from the shapes of a model and its data.

        Args:
            param_shapes: Shapes of the parameters, by path.
            fsdp: Number of devices that parameters are sharded over.
            example_shapes: Shapes of one example's image, label and targets.
            multi_slice: Whether there are several slices.
        """
        full: set[tuple[int, ...]] = set()
        for path, shape in param_shapes.items():
            full |= {_canonical_dims(shape)}
            if path.startswith("blocks/"):
                full |= {_canonical_dims(shape[1:])}
                # An unrolled scan splits its blocks into groups of equal size.
                groups = [n for n in range(2, shape[0]) if not shape[0] % n]
                full |= {_canonical_dims((n, shape[0] // n, *shape[1:])) for n in groups}
                full |= {_canonical_dims((n, *shape[1:])) for n in groups}
            if len(shape) > 2:
                full |= {_canonical_dims((math.prod(shape[:-1]), shape[-1]))}
        shards = {
            _canonical_dims((*dims[:axis], size // fsdp, *dims[axis + 1 :]))
            for dims in full
            for axis, size in enumerate(dims)
            if size % fsdp == 0
        }
        param_dims = full | shards
        total = sum(math.prod(shape) for shape in param_shapes.values())
        param_sizes = {math.prod(dims) for dims in param_dims} | {total, -(-total // fsdp)}
        # An example may be flattened, or have additional axes of size one.
        example_shapes = list(example_shapes)
        flat = {(math.prod(shape),) for shape in example_shapes}
        example_dims = frozenset({*map(_canonical_dims, example_shapes), *flat})
        return cls(frozenset(param_dims), frozenset(param_sizes), example_dims, multi_slice)

    def infer(self, op: str, array: ArrayType) -> str:
        """Infers the role of an array in a collective.

        Args:
            op: Operation of the collective.
            array: Operand.
        """
        dims = _canonical_dims(array.dims)
        if array.size <= _MAX_SCALARS and op != "collective-permute":
            return SCALARS
        if op == "collective-permute" and dims in self.example_dims:
            return MIXUP_EXAMPLES
        if self.multi_slice and array.dims[-2:] == _TILE:
            return GRADIENTS
        is_param = dims in self.param_dims or (
            len(dims) <= 1 and array.size in self.param_sizes and op in _REDUCTIONS
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
    totals: dict[tuple[str, str, str, str, ReplicaGroups], tuple[int, float]] = {}
    for executed in _iter_collectives(program):
        op = _collective_op(executed.computation, executed.instruction)
        axis, groups = _mesh_axis_and_groups(executed.instruction, op, slice_mesh, num_slices)
        if axis == "none":
            continue  # Each device communicates with itself alone.
        for (dtype, role), num_bytes in _payload(executed, op, groups, roles).items():
            if not num_bytes:
                continue  # A token.
            key = (op, dtype, axis, role, groups)
            count, total = totals.get(key, (0, 0.0))
            totals[key] = (
                count + executed.num_executions,
                total + executed.num_executions * num_bytes,
            )
    found = [
        Collective(op, dtype, axis, role, count, total, groups)
        for (op, dtype, axis, role, groups), (count, total) in totals.items()
    ]
    return sorted(found, key=lambda collective: -collective.num_bytes)


def _iter_collectives(program: Program) -> Iterator[ExecutedInstruction]:
    """Yields each executed collective once, including those inside fusions."""
    overlapped: set[str] = set()
    for computation, instruction, count in program.executed_instructions():
        if _base_op(instruction):
            yield ExecutedInstruction(computation, instruction, count)
        elif instruction.opcode == "fusion":
            for executed in _iter_fused_collectives(program, instruction, count):
                if _OVERLAPPED in executed.instruction.attributes:
                    identity = _overlapped_identity(executed.instruction)
                    if identity in overlapped:
                        continue
                    overlapped.add(identity)
                yield executed


def _iter_fused_collectives(
    program: Program, fusion: Instruction, count: int
) -> Iterator[ExecutedInstruction]:
    computation = program.computations[fusion.called_computation("calls")]
    for instruction in computation.instructions.values():
        if _base_op(instruction):
            yield ExecutedInstruction(computation, instruction, count)
        elif instruction.opcode == "fusion":
            yield from _iter_fused_collectives(program, instruction, count)


def _overlapped_identity(collective: Instruction) -> str:
    """Returns an identifier that all appearances of an overlapped collective share."""
    chain = re.search(r'chain_id="(\w+)"', collective.attributes)
    dims = [array.dims for array in collective.outputs]
    return f"{collective.int_attribute('channel_id')} {chain and chain.group(1)} {dims}"


def _base_op(instruction: Instruction) -> str:
    """Returns the collective operation that an instruction starts, or ""."""
    if instruction.opcode == "send" and (match := _MEGASCALE_OP.search(instruction.attributes)):
        return match.group(1).lower().replace("_", "-")
    base = instruction.opcode.removesuffix("-start")
    return base if base in OPS else ""


def _collective_op(computation: Computation, instruction: Instruction) -> str:
    if computation.name.startswith(_ALL_REDUCE_SCATTER):
        return "reduce-scatter"
    return _base_op(instruction)


def _mesh_axis_and_groups(
    collective: Instruction, op: str, mesh: dict[str, int], num_slices: int
) -> tuple[str, ReplicaGroups]:
    """Returns the mesh axis that a collective runs along, and its groups of devices."""
    attributes, size = collective.attributes, math.prod(mesh.values())
    if collective.opcode == "send":
        return "slices", (tuple(range(0, size * num_slices, size)),)
    is_permute = op == "collective-permute"
    groups = (
        parse_source_target_pairs(attributes)
        if is_permute
        else parse_replica_groups(attributes, size)
    )
    return mesh_axis_of(groups, mesh, pairs=is_permute), groups


def _payload(
    executed: ExecutedInstruction, op: str, groups: ReplicaGroups, roles: TensorRoles
) -> dict[tuple[str, str], float]:
    """Returns the bytes of one execution of a collective, by dtype and tensor role."""
    num_shards = len(groups[0]) if op == "all-gather" else 1
    instructions, collective = executed.computation.instructions, executed.instruction
    arrays = [array for name in collective.operands for array in instructions[name].outputs]
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
        devices = _transposed_iota(match.group(2), match.group(3))
        size = _parse_ints(match.group(1))[-1]
        starts = range(0, len(devices), size)
        return tuple(tuple(devices[start : start + size]) for start in starts)
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
    sizes = list(mesh.values())
    crossed = {
        axis
        for group in groups
        for coordinates in [[_unravel(device, sizes) for device in group]]
        for axis in range(len(mesh))
        if len({coordinate[axis] for coordinate in coordinates}) > 1
    }
    if not crossed:
        return "none"
    group_size = math.prod(sizes[axis] for axis in crossed)
    if not pairs and any(len(group) != group_size for group in groups):
        return "other"
    if len(crossed) == 1:
        return list(mesh)[crossed.pop()]
    return "all"


def _unravel(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    coordinates = []
    for size in reversed(sizes):
        index, coordinate = divmod(index, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


def _mesh_groups(axes: str, device_ids: str | None, used: str) -> ReplicaGroups:
    """Returns the groups along axes of a mesh, or along parts of axes, `name:(before)size`."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    # Each axis becomes three: before the used part, the used part, and the rest.
    splits: dict[str, list[int]] = {name: [1, size, 1] for name, size in sizes.items()}
    used_names = []
    for name, before, part in _USED_AXIS.findall(used):
        if before:
            splits[name] = [int(before), int(part), sizes[name] // int(before) // int(part)]
        used_names.append(name)
    shape = [size for name in sizes for size in splits[name]]
    used_axes = [3 * list(sizes).index(name) + 1 for name in used_names]
    other_axes = [axis for axis in range(len(shape)) if axis not in used_axes]
    order = _mesh_device_order(device_ids, math.prod(shape))

    def device_at(coordinates: dict[int, int]) -> int:
        index = 0
        for axis, size in enumerate(shape):
            index = index * size + coordinates.get(axis, 0)
        return order[index]

    def coordinates_along(axes: list[int]) -> list[dict[int, int]]:
        ranges = [range(shape[axis]) for axis in axes]
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*ranges)]

    return tuple(
        tuple(device_at(fixed | varying) for varying in coordinates_along(used_axes))
        for fixed in coordinates_along(other_axes)
    )


def _mesh_device_order(device_ids: str | None, num_devices: int) -> list[int]:
    """Returns the devices of a mesh row by row from `[8]`, `[4,2]T(1,0)`, a list, or nothing."""
    if not device_ids:
        return list(range(num_devices))
    if match := re.search(r"\[([\d,]+)\]T\(([\d,]+)", device_ids):
        return _transposed_iota(*match.groups())
    listed = _parse_ints(device_ids.strip("[]"))
    return list(listed) if len(listed) == num_devices else list(range(num_devices))


def _transposed_iota(shape: str, permutation: str | None) -> list[int]:
    """Returns 0, 1, 2, … reshaped, transposed and read row by row."""
    sizes = _parse_ints(shape)
    axes = _parse_ints(permutation) if permutation else tuple(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ranges = [range(sizes[axis]) for axis in axes]
    return [
        sum(index * strides[axis] for index, axis in zip(indices, axes, strict=True))
        for indices in itertools.product(*ranges)
    ]


def _parse_listed_groups(text: str) -> ReplicaGroups:
    return tuple(_parse_ints(group) for group in re.findall(r"\{([\d,\s]*)\}", text))


def _parse_ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
