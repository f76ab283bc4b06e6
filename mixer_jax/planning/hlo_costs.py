"""Matmul FLOPs and memory traffic of a compiled program, in total and by region of the model.

The compiler keeps the JAX name stack of each instruction, for example
`jit(train_step)/jvp(Model)/while/body/blocks/mlp/Dense_0/dot_general`. A region is a pattern of
such names, which the model family provides. These rules apply in order:

1. A fusion with matmuls belongs to the region of the largest. Everything else in it, such as a
   LayerNorm of the input or a GELU of the output, causes no additional traffic.
2. Any other fusion belongs to the region that computes most of its elements.
3. Any other instruction belongs to the region of its name.
4. Data movement without such a name, such as a copy that the compiler inserts, belongs to the
   region of its consumers if it loads on-chip memory, and otherwise to that of its producers.
5. Everything else, such as a residual connection that is not fused, is "other".
"""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter

from mixer_jax.planning.hlo import ArrayType, Instruction, Program

# Regions of every model, besides those of its family.
OPTIMIZER, OTHER = "optimizer", "other"
# The optimizer's arguments have the names of modules, so this comes first. What a training step
# computes outside of modules and of differentiated code is the update.
_OPTIMIZER_NAME = re.compile(r"\boptimizer\b|opt_state|^jit\(\w*step\)/(?!.*jvp\()")
# Opcodes that only move or name data.
_DATA_MOVEMENT = re.compile(
    "(async|bitcast|copy|dynamic-slice|dynamic-update-slice|slice)(-start|-update|-done)?|"
    "constant|custom-call|get-tuple-element|parameter|reshape|transpose|tuple"
)
# Opcodes that only name values, or wait for an operation that is counted where it starts.
_FREE = {
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast")
# A collective that overlaps with several fusions appears in each of them; the first starts it.
_OVERLAPPED, _STARTS = "async_collective_fusion_config", '"flag_start":"-1"'
_ASYNC_COLLECTIVE = "AsyncCollective"
_SLICES = {"dynamic-slice", "gather", "slice"}
_FORWARDING = {"bitcast", "convert", "copy", "reshape", "transpose"}
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTING_DIMS = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def region_of_op(op_name: str, regions: Mapping[str, str]) -> str:
    """Returns the region of an operation.

    Args:
        op_name: JAX name stack of the operation; an empty one is "other".
        regions: Patterns of the model's regions, by name; the first match counts.
    """
    if _OPTIMIZER_NAME.search(op_name):
        return OPTIMIZER
    return next((name for name, pattern in regions.items() if re.search(pattern, op_name)), OTHER)


def sum_by_region(
    costs: Iterable[tuple[Instruction, float]], regions: Mapping[str, str]
) -> dict[str, float]:
    """Sums costs by region, including regions without any.

    Args:
        costs: Instructions and their costs, from `iter_hbm_bytes` or `iter_matmul_flops`.
        regions: Patterns of the model's regions, by name.
    """
    totals = dict.fromkeys([*regions, OPTIMIZER, OTHER], 0.0)
    for instruction, cost in costs:
        totals[region_of(instruction, regions)] += cost
    return totals


def region_of(instruction: Instruction, regions: Mapping[str, str]) -> str:
    """Returns the region of an executed instruction."""
    region = _own_region(instruction, regions)
    if region != OTHER or not _is_data_movement(instruction):
        return region
    directions = [attrgetter("users"), attrgetter("operands")]
    loads_chip = instruction.outputs and _written_array(instruction).memory_space
    if not loads_chip:
        directions.reverse()
    nearest = (_nearest_region(instruction, neighbors, regions) for neighbors in directions)
    return next((region for region in nearest if region != OTHER), OTHER)


def _own_region(instruction: Instruction, regions: Mapping[str, str]) -> str:
    """Returns the region of an instruction by what it contains and its name."""
    matmuls = list(_iter_matmuls(instruction))
    if matmuls:
        largest, _ = max(matmuls, key=lambda item: item[1])
        if (region := region_of_op(largest.op_name, regions)) != OTHER:
            return region
    if instruction.opcode == "fusion":
        elements: Counter[str] = Counter()
        for inner in instruction.leaves():
            region = region_of_op(inner.op_name, regions)
            if inner.opcode != "parameter" and region != OTHER:
                elements[region] += sum(array.size for array in inner.outputs)
        if elements:
            return elements.most_common(1)[0][0]
    return region_of_op(instruction.op_name, regions)


def _is_data_movement(instruction: Instruction) -> bool:
    """Returns whether an instruction computes nothing, except perhaps scalars as indices."""
    if instruction.opcode != "fusion":
        return bool(_DATA_MOVEMENT.fullmatch(instruction.opcode))
    return all(
        _DATA_MOVEMENT.fullmatch(inner.opcode) or all(array.size == 1 for array in inner.outputs)
        for inner in instruction.leaves()
    )


def _nearest_region(
    instruction: Instruction,
    neighbors: Callable[[Instruction], list[Instruction]],
    regions: Mapping[str, str],
) -> str:
    """Returns the region of the nearest instruction that has one, through data movement."""
    seen, queue = {instruction}, deque(neighbors(instruction))
    while queue:
        neighbor = queue.popleft()
        if neighbor in seen:
            continue
        seen.add(neighbor)
        if (region := _own_region(neighbor, regions)) != OTHER:
            return region
        if _is_data_movement(neighbor):
            queue.extend(neighbors(neighbor))
    return OTHER


def iter_matmul_flops(program: Program) -> Iterator[tuple[Instruction, float]]:
    """Yields each executed instruction with the matmul FLOPs of all its executions.

    A multiply-add is two FLOPs. Element-wise operations such as GELU are not counted. A custom
    kernel counts with the FLOPs of its `cost_estimate`.
    """
    for instruction, num_executions in program.executed_instructions():
        if instruction.opcode == "custom-call":
            flops = float(_cost_estimate(instruction, "flops"))
        else:
            flops = sum(flops for _, flops in _iter_matmuls(instruction))
        yield instruction, num_executions * flops


def _cost_estimate(instruction: Instruction, name: str) -> int:
    """Returns a number of a custom kernel's own estimate; 0 if it has none."""
    pattern = rf'cost_estimate":\{{[^}}]*"{name}":"(\d+)"'
    match = re.search(pattern, instruction.attributes)
    return int(match.group(1)) if match else 0


def _iter_matmuls(instruction: Instruction) -> Iterator[tuple[Instruction, float]]:
    """Yields the matmuls in an instruction, including those inside a fusion, and their FLOPs."""
    for inner in instruction.leaves():
        if inner.opcode == "dot":
            yield inner, _dot_flops(inner)
        elif inner.opcode == "convolution":
            yield inner, _convolution_flops(inner)


def _dot_flops(dot: Instruction) -> float:
    lhs = dot.operands[0].outputs[0]
    match = _CONTRACTING_DIMS.search(dot.attributes)
    axes = match.group(1).split(",") if match else []
    contracted = math.prod(lhs.dims[int(axis)] for axis in axes if axis)
    return 2.0 * dot.outputs[0].size * contracted


def _convolution_flops(convolution: Instruction) -> float:
    """Returns the FLOPs of a convolution, as which the TPU compiler writes every matmul.

    Window positions over padding, or over holes that dilation leaves, are free: the compiler
    writes matmuls with batch axes that way.
    """
    labels = _DIM_LABELS.search(convolution.attributes)
    assert labels is not None, convolution.attributes
    input_labels, kernel_labels, output_labels = labels.groups()
    image, kernel = (operand.outputs[0] for operand in convolution.operands)
    output = convolution.outputs[0]
    match = _WINDOW.search(convolution.attributes)
    window = dict(item.split("=") for item in match.group(1).split()) if match else {}
    positions = 1
    for index, axis in enumerate(sorted(label for label in output_labels if label.isdigit())):
        positions *= _count_window_positions(
            image.dims[input_labels.index(axis)],
            output.dims[output_labels.index(axis)],
            {name: text.split("x")[index] for name, text in window.items()},
        )
    outputs = math.prod(output.dims[output_labels.index(label)] for label in "bf")
    return 2.0 * positions * outputs * kernel.dims[kernel_labels.index("i")]


def _count_window_positions(input_size: int, output_size: int, window: dict[str, str]) -> int:
    """Counts the pairs of an output and a window element, along one axis, that meet an input."""
    size, stride = int(window.get("size", 1)), int(window.get("stride", 1))
    padding = int(window.get("pad", "0_0").split("_")[0])
    lhs_dilation, rhs_dilation = (int(window.get(f"{x}hs_dilate", 1)) for x in "lr")
    positions = (
        output * stride + element * rhs_dilation - padding
        for output in range(output_size)
        for element in range(size)
    )
    return sum(0 <= p < input_size * lhs_dilation and p % lhs_dilation == 0 for p in positions)


def hbm_bytes_by_opcode(program: Program) -> Counter[str]:
    """Returns the bytes read and written, padded to whole tiles, by opcode."""
    totals: Counter[str] = Counter()
    for instruction, num_bytes in iter_hbm_bytes(program):
        totals[instruction.opcode.removesuffix("-start")] += num_bytes
    return +totals


def iter_hbm_bytes(program: Program) -> Iterator[tuple[Instruction, int]]:
    """Yields each executed instruction with the bytes that all its executions read and write.

    Arrays in on-chip memory (memory space other than 0) are not counted. If a fusion only slices
    an operand, or updates a slice of it, only the slices are counted. An operand that a matmul
    reads more than once, because it does not fit into on-chip memory, is counted once.

    A custom kernel (a custom call) is counted as reading its operands and writing its results, even
    if a result aliases an operand. If its `cost_estimate` has more bytes than that, the estimate
    is used, since a kernel may read something again.
    """
    for instruction, num_executions in program.executed_instructions():
        yield instruction, int(num_executions * _instruction_bytes(instruction))


def _written_array(instruction: Instruction) -> ArrayType:
    """Returns the array that an instruction writes; for the start of a copy, the copy."""
    # The result of a start has the copy, the original and a semaphore, in an order that depends on
    # the opcode.
    return instruction.outputs[-2 if instruction.opcode == "slice-start" else 0]


def _instruction_bytes(instruction: Instruction) -> float:
    opcode, operands, outputs = instruction.opcode, instruction.operands, instruction.outputs
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "fusion":
        parameters = instruction.fused_computation.parameters
        read = sum(
            _bytes_read(parameter, operand.outputs)
            for parameter, operand in zip(parameters, operands, strict=True)
        )
        return read + sum(_bytes_written(instruction.fused_computation.root, outputs))
    if opcode in {*_SLICES, "copy-start", "slice-start", "dynamic-update-slice"}:
        is_update = opcode == "dynamic-update-slice"
        moved = operands[1].outputs[0] if is_update else _written_array(instruction)
        is_in_hbm = operands[0].outputs[0].memory_space == 0
        return moved.hbm_bytes + (moved.padded_bytes if is_in_hbm else 0)
    inputs = [array for operand in operands for array in operand.outputs]
    if opcode == "send":
        return _total_hbm_bytes(inputs)  # The result is the operand.
    if opcode.endswith("-start"):
        # The result of a collective's start repeats its operands.
        repeats = 0 if opcode == "all-reduce-start" else len(inputs)
        return _total_hbm_bytes([*inputs, *outputs[repeats:]])
    arrays = [*inputs, *outputs]
    rereads = 0.0
    if opcode == "custom-call":
        if any(name in instruction.attributes for name in _FREE_CUSTOM_CALLS):
            return 0
        accesses = sum(array.padded_bytes for array in arrays)
        rereads = max(0, _cost_estimate(instruction, "bytes_accessed") - accesses)
    return _total_hbm_bytes(arrays) + rereads


def _bytes_read(parameter: Instruction, arrays: tuple[ArrayType, ...]) -> float:
    """Returns the bytes that a fusion reads of one operand."""
    if len(arrays) != 1 or arrays[0].memory_space:
        return _total_hbm_bytes(arrays)
    return min(arrays[0].padded_bytes, sum(_bytes_read_by_users(parameter, arrays[0])))


def _bytes_read_by_users(value: Instruction, array: ArrayType) -> Iterator[float]:
    """Yields the bytes that each user of a value inside a fusion reads of it."""
    for user in value.users:
        position = user.operands.index(value)
        if user.opcode in _SLICES and position == 0:
            yield user.outputs[0].padded_bytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            yield 0  # Updated in place.
        elif user.opcode in _FORWARDING and not user.is_root:
            yield from _bytes_read_by_users(user, array)
        elif user.opcode == "fusion":
            yield from _bytes_read_by_users(user.fused_computation.parameters[position], array)
        elif user.opcode == "tuple" or _ASYNC_COLLECTIVE in user.attributes or _is_ongoing(user):
            yield 0  # Only passed on.
        else:
            yield array.padded_bytes


def _bytes_written(root: Instruction, outputs: tuple[ArrayType, ...]) -> Iterator[float]:
    """Yields the bytes that a fusion writes of each output."""
    if _ASYNC_COLLECTIVE in root.attributes:
        yield min(sum(map(_changed_bytes, root.operands)), _total_hbm_bytes(outputs))
        return
    values = root.operands if root.opcode == "tuple" else [root]
    if len(values) != len(outputs):
        yield _total_hbm_bytes(outputs)
        return
    for value, array in zip(values, outputs, strict=True):
        yield 0 if array.memory_space else min(array.padded_bytes, _changed_bytes(value))


def _changed_bytes(value: Instruction) -> float:
    """Returns the bytes of a fusion's value that differ from what memory held before."""
    all_bytes = sum(array.padded_bytes for array in value.outputs)
    is_new = False
    while value.opcode in _FORWARDING:
        is_new = is_new or value.opcode != "bitcast"
        value = value.operands[0]
    if value.opcode == "parameter":
        return all_bytes if is_new else 0
    if _is_ongoing(value):
        return 0
    if value.opcode == "dynamic-update-slice":
        return value.operands[1].outputs[0].padded_bytes
    if value.opcode == "fusion" and len(value.outputs) == 1:
        return min(value.outputs[0].padded_bytes, _changed_bytes(value.fused_computation.root))
    return all_bytes


def _is_ongoing(instruction: Instruction) -> bool:
    """Returns whether this is a collective that an earlier fusion started."""
    return _OVERLAPPED in instruction.attributes and _STARTS not in instruction.attributes


def _total_hbm_bytes(arrays: Iterable[ArrayType]) -> float:
    return sum(array.hbm_bytes for array in arrays)
