"""Bytes that one call of a compiled program moves to and from the main memory of a device (HBM)."""

from collections import Counter
from collections.abc import Iterable, Iterator

from mixer_jax.planning.program import ArrayType, Computation, Instruction, Program, Run

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
_SLICES = {"dynamic-slice", "gather", "slice"}
_PASSING = {"bitcast", "convert", "copy", "reshape", "transpose"}


def traffic(program: Program) -> Counter[str]:
    """Returns bytes read and written, padded to whole tiles as they lie, by opcode.

    What lies in on-chip memory (another space than 0) is not counted; of an operand that a fusion
    only takes slices of, or writes a slice into, the slices are.

    Args:
        program: from `read_program`.
    """
    counted: Counter[str] = Counter()
    for run in program.runs():
        counted[run.instruction.opcode.removesuffix("-start")] += int(
            run.times * _bytes_of(program, run)
        )
    return +counted


def _bytes_of(program: Program, run: Run) -> float:
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
        # Its value is the copy, the original and a signal, in the one order or the other.
        copy = instruction.arrays[0] if opcode == "copy-start" else instruction.arrays[-2]
        original = taken[0][0]
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
    return sum(map(_main, [*_flat(taken), *instruction.arrays]))


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
        elif user.opcode == "tuple":
            yield 0  # It is only handed on.
        else:
            yield whole.padded_bytes


def _written(
    program: Program, inside: Computation, arrays: tuple[ArrayType, ...]
) -> Iterator[float]:
    """Yields the bytes that a fusion writes of each array of its value."""
    root = inside.instructions[inside.root]
    values = [inside.instructions[name] for name in root.operands]
    values = values if root.opcode == "tuple" else [root]
    if len(values) != len(arrays):
        yield from map(_main, arrays)
        return
    for value, array in zip(values, arrays, strict=True):
        yield 0 if array.space else min(array.padded_bytes, _changed(program, inside, value))


def _changed(program: Program, inside: Computation, value: Instruction) -> float:
    """Returns the bytes of a fusion's value that are not as they were before it."""
    while value.opcode in _PASSING:
        value = inside.instructions[value.operands[0]]
    if value.opcode == "parameter":
        return 0
    if value.opcode == "dynamic-update-slice":
        return inside.instructions[value.operands[1]].arrays[0].padded_bytes
    if value.opcode == "fusion" and len(value.arrays) == 1:
        called = program.computations[value.computation("calls")]
        return min(
            value.arrays[0].padded_bytes,
            _changed(program, called, called.instructions[called.root]),
        )
    return sum(array.padded_bytes for array in value.arrays)


def _users(inside: Computation, name: str) -> list[Instruction]:
    return [user for user in inside.instructions.values() if name in user.operands]


def _main(array: ArrayType) -> float:
    """Returns the bytes of an array in main memory, 0 of one that lies elsewhere."""
    return 0 if array.space else array.padded_bytes


def _flat(tuples: Iterable[tuple[ArrayType, ...]]) -> list[ArrayType]:
    return [array for arrays in tuples for array in arrays]
