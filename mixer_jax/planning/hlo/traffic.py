"""Bytes that one call of a compiled program moves to and from the main memory of a device (HBM)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from mixer_jax.planning.hlo.instruction import ArrayType, Instruction
from mixer_jax.planning.hlo.program import Computation, ExecutedInstruction, Program

# They name values, or wait for what was counted where it began.
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
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
_ESTIMATE = re.compile(r'cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
# A collective that goes on while fusions compute stands in each of them; the first begins it.
_SPREAD, _BEGINS = "async_collective_fusion_config", '"flag_start":"-1"'
_HANDED_ON = "AsyncCollective"
_SLICES = {"dynamic-slice", "gather", "slice"}
_PASSING = {"bitcast", "convert", "copy", "reshape", "transpose"}


def traffic(program: Program) -> Counter[str]:
    """Returns bytes read and written, padded to whole tiles as they lie, by opcode.

    Args:
        program: from `read_program`.
    """
    counted: Counter[str] = Counter()
    for run, num_bytes in iter_hbm_bytes(program):
        counted[run.instruction.opcode.removesuffix("-start")] += num_bytes
    return +counted


def iter_hbm_bytes(program: Program) -> Iterator[tuple[ExecutedInstruction, int]]:
    """Yields what the device runs and the bytes that all of its times read and write.

    What lies in on-chip memory (another space than 0) is not counted; of an operand that a fusion
    only takes slices of, or writes a slice into, the slices are. What a product reads more than
    once, because it does not fit on the chip whole, is counted once.

    A kernel written by hand, a custom call, is taken to read its operands and to write its results,
    also where a result lies in an operand's place; and to move what its `cost_estimate` says beyond
    that, since it may read something again.

    Args:
        program: from `read_program`.
    """
    for run in program.runs():
        yield run, int(run.times * _bytes_of(program, run))


def copied_array(instruction: Instruction) -> ArrayType:
    """Returns the array that an instruction makes; of one that begins a copy, that copy."""
    # The value of such a beginning is the copy, the original and a signal, in one order or another.
    return instruction.arrays[-2 if instruction.opcode == "slice-start" else 0]


def _bytes_of(program: Program, run: ExecutedInstruction) -> float:
    computation, instruction, _ = run
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CALLS):
        return 0
    taken = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode == "fusion":
        inside = program.computations[instruction.computation("calls")]
        read = sum(
            _read(program, inside, name, arrays)
            for name, arrays in zip(inside.parameters, taken, strict=True)
        )
        return read + sum(_written(program, inside, instruction.arrays))
    if opcode in {"copy-start", "slice-start"}:
        copy, original = copied_array(instruction), taken[0][0]
        return _main(copy) + (copy.padded_bytes if original.space == 0 else 0)
    if opcode in _SLICES:
        piece = instruction.arrays[0]
        return _main(piece) + (piece.padded_bytes if taken[0][0].space == 0 else 0)
    if opcode == "dynamic-update-slice":
        update = taken[1][0]
        return _main(update) + (update.padded_bytes if taken[0][0].space == 0 else 0)
    if opcode.endswith("-start"):
        # The value of a collective's start holds its operands once more.
        copies = len([array for arrays in taken for array in arrays])
        written = (
            instruction.arrays if opcode == "all-reduce-start" else instruction.arrays[copies:]
        )
        return sum(map(_main, [*_flat(taken), *written]))
    if opcode == "send":
        return sum(map(_main, _flat(taken)))  # Its value is what it sends.
    all_of_it = [*_flat(taken), *instruction.arrays]
    return sum(map(_main, all_of_it)) + _again(instruction, all_of_it)


def _again(instruction: Instruction, arrays: list[ArrayType]) -> float:
    """Returns the bytes that a kernel written by hand moves beyond all its arrays, once each."""
    said = _ESTIMATE.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return max(0, int(said.group(1)) - sum(array.padded_bytes for array in arrays)) if said else 0


def _read(program: Program, inside: Computation, name: str, arrays: tuple[ArrayType, ...]) -> float:
    """Returns the bytes that a fusion reads of one operand."""
    if len(arrays) != 1 or arrays[0].space:
        return sum(map(_main, arrays))
    whole = arrays[0].padded_bytes
    return min(whole, sum(_read_by(program, inside, name, arrays[0])))


def _read_by(program: Program, inside: Computation, name: str, whole: ArrayType) -> Iterator[float]:
    """Yields the bytes that each user of a value inside a fusion reads of it."""
    for user in _users(inside, name):
        place = user.operands.index(name)
        if user.opcode in _SLICES and not place:
            yield user.arrays[0].padded_bytes
        elif user.opcode == "dynamic-update-slice" and not place:
            yield 0  # It is written into where it lies.
        elif user.opcode in _PASSING and user.name != inside.root:
            yield from _read_by(program, inside, user.name, whole)
        elif user.opcode == "fusion":
            called = program.computations[user.computation("calls")]
            yield from _read_by(program, called, called.parameters[place], whole)
        elif user.opcode == "tuple" or _HANDED_ON in user.attributes or _goes_on(user):
            yield 0  # It is only handed on.
        else:
            yield whole.padded_bytes


def _written(
    program: Program, inside: Computation, arrays: tuple[ArrayType, ...]
) -> Iterator[float]:
    """Yields the bytes that a fusion writes of each array of its value."""
    root = inside.instructions[inside.root]
    if _HANDED_ON in root.attributes:
        made = [_changed(program, inside, inside.instructions[name]) for name in root.operands]
        yield min(sum(made), sum(map(_main, arrays)))
        return
    values = [inside.instructions[name] for name in root.operands]
    values = values if root.opcode == "tuple" else [root]
    if len(values) != len(arrays):
        yield from map(_main, arrays)
        return
    for value, array in zip(values, arrays, strict=True):
        yield 0 if array.space else min(array.padded_bytes, _changed(program, inside, value))


def _changed(program: Program, inside: Computation, value: Instruction) -> float:
    """Returns the bytes of a fusion's value that are not as they were before it."""
    whole = sum(array.padded_bytes for array in value.arrays)
    is_new = False
    while value.opcode in _PASSING:
        is_new = is_new or value.opcode != "bitcast"
        value = inside.instructions[value.operands[0]]
    if value.opcode == "parameter":
        return whole if is_new else 0
    if _goes_on(value):
        return 0
    if value.opcode == "dynamic-update-slice":
        return inside.instructions[value.operands[1]].arrays[0].padded_bytes
    if value.opcode == "fusion" and len(value.arrays) == 1:
        called = program.computations[value.computation("calls")]
        return min(
            value.arrays[0].padded_bytes,
            _changed(program, called, called.instructions[called.root]),
        )
    return whole


def _goes_on(instruction: Instruction) -> bool:
    """Returns whether it is a collective that another fusion began."""
    return _SPREAD in instruction.attributes and _BEGINS not in instruction.attributes


def _users(inside: Computation, name: str) -> list[Instruction]:
    return [user for user in inside.instructions.values() if name in user.operands]


def _main(array: ArrayType) -> float:
    """Returns the bytes of an array in main memory, 0 of one that lies elsewhere."""
    return 0 if array.space else array.padded_bytes


def _flat(tuples: Iterable[tuple[ArrayType, ...]]) -> list[ArrayType]:
    return [array for arrays in tuples for array in arrays]
