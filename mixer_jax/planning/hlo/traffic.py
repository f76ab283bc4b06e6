"""Bytes that a compiled program reads from and writes to main memory (HBM)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from mixer_jax.planning.hlo.program import (
    ArrayType,
    Computation,
    ExecutedInstruction,
    Instruction,
    Program,
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
# A custom kernel's own estimate.
_COST_ESTIMATE = re.compile(r'cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
# A collective that overlaps with several fusions appears in each of them; the first starts it.
_OVERLAPPED, _STARTS = "async_collective_fusion_config", '"flag_start":"-1"'
_ASYNC_COLLECTIVE = "AsyncCollective"
_SLICES = {"dynamic-slice", "gather", "slice"}
_FORWARDING = {"bitcast", "convert", "copy", "reshape", "transpose"}


def hbm_bytes_by_opcode(program: Program) -> Counter[str]:
    """Returns the bytes read and written, padded to whole tiles, by opcode."""
    totals: Counter[str] = Counter()
    for executed, num_bytes in iter_hbm_bytes(program):
        totals[executed.instruction.opcode.removesuffix("-start")] += num_bytes
    return +totals


def iter_hbm_bytes(program: Program) -> Iterator[tuple[ExecutedInstruction, int]]:
    """Yields each executed instruction with the bytes that all its executions read and write.

    Arrays in on-chip memory (memory space other than 0) are not counted. If a fusion only slices
    an operand, or updates a slice of it, only the slices are counted. An operand that a matmul
    reads more than once, because it does not fit into on-chip memory, is counted once.

    A custom kernel (a custom call) is counted as reading its operands and writing its results, even
    if a result aliases an operand. If its `cost_estimate` has more bytes than that, the estimate
    is used, since a kernel may read something again.
    """
    for executed in program.executed_instructions():
        yield executed, int(executed.num_executions * _instruction_bytes(program, executed))


def copied_array(instruction: Instruction) -> ArrayType:
    """Returns the array that an instruction writes; for the start of a copy, the copy."""
    # The result of a start has the copy, the original and a semaphore, in an order that depends on
    # the opcode.
    return instruction.outputs[-2 if instruction.opcode == "slice-start" else 0]


def _instruction_bytes(program: Program, executed: ExecutedInstruction) -> float:
    computation, instruction, _ = executed
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(
        name in instruction.attributes for name in _FREE_CUSTOM_CALLS
    ):
        return 0
    inputs = [computation.instructions[name].outputs for name in instruction.operands]
    if opcode == "fusion":
        fused = program.computations[instruction.called_computation("calls")]
        read = sum(
            _bytes_read(program, fused, name, arrays)
            for name, arrays in zip(fused.parameters, inputs, strict=True)
        )
        return read + sum(_bytes_written(program, fused, instruction.outputs))
    if opcode in {"copy-start", "slice-start"}:
        copy, original = copied_array(instruction), inputs[0][0]
        return copy.hbm_bytes + (copy.padded_bytes if original.memory_space == 0 else 0)
    if opcode in _SLICES:
        result, original = instruction.outputs[0], inputs[0][0]
        return result.hbm_bytes + (result.padded_bytes if original.memory_space == 0 else 0)
    if opcode == "dynamic-update-slice":
        update, original = inputs[1][0], inputs[0][0]
        return update.hbm_bytes + (update.padded_bytes if original.memory_space == 0 else 0)
    if opcode.endswith("-start"):
        # The result of a collective's start repeats its operands.
        num_inputs = len(_flatten(inputs))
        repeats = 0 if opcode == "all-reduce-start" else num_inputs
        return _total_hbm_bytes([*_flatten(inputs), *instruction.outputs[repeats:]])
    if opcode == "send":
        return _total_hbm_bytes(_flatten(inputs))  # The result is the operand.
    arrays = [*_flatten(inputs), *instruction.outputs]
    return _total_hbm_bytes(arrays) + _rereads(instruction, arrays)


def _rereads(instruction: Instruction, arrays: list[ArrayType]) -> float:
    """Returns the bytes of a custom kernel's cost estimate beyond one access of each array."""
    if instruction.opcode != "custom-call":
        return 0
    estimate = _COST_ESTIMATE.search(instruction.attributes)
    if not estimate:
        return 0
    return max(0, int(estimate.group(1)) - sum(array.padded_bytes for array in arrays))


def _bytes_read(
    program: Program, fused: Computation, name: str, arrays: tuple[ArrayType, ...]
) -> float:
    """Returns the bytes that a fusion reads of one operand."""
    if len(arrays) != 1 or arrays[0].memory_space:
        return _total_hbm_bytes(arrays)
    return min(arrays[0].padded_bytes, sum(_bytes_read_by_users(program, fused, name, arrays[0])))


def _bytes_read_by_users(
    program: Program, fused: Computation, name: str, array: ArrayType
) -> Iterator[float]:
    """Yields the bytes that each user of a value inside a fusion reads of it."""
    for user in fused.instructions.values():
        if name not in user.operands:
            continue
        position = user.operands.index(name)
        if user.opcode in _SLICES and position == 0:
            yield user.outputs[0].padded_bytes
        elif user.opcode == "dynamic-update-slice" and position == 0:
            yield 0  # Updated in place.
        elif user.opcode in _FORWARDING and user.name != fused.root:
            yield from _bytes_read_by_users(program, fused, user.name, array)
        elif user.opcode == "fusion":
            called = program.computations[user.called_computation("calls")]
            parameter = called.parameters[position]
            yield from _bytes_read_by_users(program, called, parameter, array)
        elif user.opcode == "tuple" or _ASYNC_COLLECTIVE in user.attributes or _is_ongoing(user):
            yield 0  # Only passed on.
        else:
            yield array.padded_bytes


def _bytes_written(
    program: Program, fused: Computation, outputs: tuple[ArrayType, ...]
) -> Iterator[float]:
    """Yields the bytes that a fusion writes of each output."""
    root = fused.instructions[fused.root]
    if _ASYNC_COLLECTIVE in root.attributes:
        written = [_changed_bytes(program, fused, fused.instructions[n]) for n in root.operands]
        yield min(sum(written), _total_hbm_bytes(outputs))
        return
    values = (
        [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    )
    if len(values) != len(outputs):
        yield from (array.hbm_bytes for array in outputs)
        return
    for value, array in zip(values, outputs, strict=True):
        changed = _changed_bytes(program, fused, value)
        yield 0 if array.memory_space else min(array.padded_bytes, changed)


def _changed_bytes(program: Program, fused: Computation, value: Instruction) -> float:
    """Returns the bytes of a fusion's value that differ from what memory held before."""
    all_bytes = sum(array.padded_bytes for array in value.outputs)
    is_new = False
    while value.opcode in _FORWARDING:
        is_new = is_new or value.opcode != "bitcast"
        value = fused.instructions[value.operands[0]]
    if value.opcode == "parameter":
        return all_bytes if is_new else 0
    if _is_ongoing(value):
        return 0
    if value.opcode == "dynamic-update-slice":
        return fused.instructions[value.operands[1]].outputs[0].padded_bytes
    if value.opcode == "fusion" and len(value.outputs) == 1:
        called = program.computations[value.called_computation("calls")]
        changed = _changed_bytes(program, called, called.instructions[called.root])
        return min(value.outputs[0].padded_bytes, changed)
    return all_bytes


def _is_ongoing(instruction: Instruction) -> bool:
    """Returns whether this is a collective that an earlier fusion started."""
    return _OVERLAPPED in instruction.attributes and _STARTS not in instruction.attributes


def _total_hbm_bytes(arrays: Iterable[ArrayType]) -> float:
    return sum(array.hbm_bytes for array in arrays)


def _flatten(tuples: Iterable[tuple[ArrayType, ...]]) -> list[ArrayType]:
    return [array for arrays in tuples for array in arrays]
