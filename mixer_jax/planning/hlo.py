"""Compiled XLA programs, parsed from their text, with the number of times each instruction runs."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_KNOWN_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_MATMUL_OR_COLLECTIVE = re.compile(
    r"dot|convolution|(all-|reduce-scatter|collective-|ragged-all-|send).*"
)
# Opcodes that pass a scalar on unchanged.
_FORWARDING = {"copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"}
# Attributes of the computations that instructions execute, instruction by instruction.
_BODIES = {
    "while": ("body",),
    "call": ("to_apply",),
    "async-start": ("calls",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}


class ArrayType(NamedTuple):
    """Type and layout of one array of a program.

    Attributes:
        dtype: Element type as XLA writes it, e.g. "bf16".
        dims: Sizes of the axes.
        minor_to_major: Axes from the fastest-varying to the slowest.
        tile: Sizes of the layout's first tile, over the fastest axes; empty if not tiled.
        memory_space: Memory that holds the array; 0 is the device's main memory (HBM).
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory_space: int = 0

    @property
    def itemsize(self) -> float:
        """Bytes per element."""
        if self.dtype == "pred":
            return 1
        bits = re.search(r"\d+", self.dtype)
        return int(bits.group()) / 8 if bits else 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Bytes of the elements, without padding."""
        return self.size * self.itemsize

    @property
    def padded_bytes(self) -> float:
        """Bytes in memory, padded to whole tiles."""
        order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
        sizes = [self.dims[axis] for axis in reversed(order)]
        for distance, tile_size in enumerate(reversed(self.tile), start=1):
            if distance <= len(sizes):
                sizes[-distance] = -(-sizes[-distance] // tile_size) * tile_size
        return math.prod(sizes) * self.itemsize

    @property
    def hbm_bytes(self) -> float:
        """Bytes in main memory, padded to whole tiles; 0 for an array in on-chip memory."""
        return 0 if self.memory_space else self.padded_bytes


@dataclasses.dataclass(eq=False, repr=False)
class Instruction:
    """One instruction, linked with those that it reads and those that read it.

    Attributes:
        opcode: Operation, e.g. "fusion".
        outputs: Arrays of the result; the elements of a tuple in order.
        operand_text: Text between the parentheses.
        attributes: Text after the parentheses.
        operands: Instructions whose results it reads.
        users: Instructions of the same computation that read its result.
    """

    name: str
    opcode: str
    outputs: tuple[ArrayType, ...]
    operand_text: str
    attributes: str
    computation: "Computation"
    operands: list["Instruction"] = dataclasses.field(default_factory=list)
    users: list["Instruction"] = dataclasses.field(default_factory=list)

    @property
    def op_name(self) -> str:
        """JAX name stack of the source operation: modules, scopes, primitive; "" if unknown."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    @property
    def is_root(self) -> bool:
        """True if its result is that of its computation."""
        return self.computation.root is self

    @property
    def bodies(self) -> list["Computation"]:
        """Computations that it executes instruction by instruction, unlike a fusion."""
        return [c for name in _BODIES.get(self.opcode, ()) for c in self.called_computations(name)]

    @property
    def fused_computation(self) -> "Computation":
        """Computation of a fusion."""
        (computation,) = self.called_computations("calls")
        return computation

    def leaves(self) -> Iterator["Instruction"]:
        """Yields the instructions inside a fusion, also a nested one; any other yields itself."""
        if self.opcode != "fusion":
            yield self
            return
        for instruction in self.fused_computation.instructions.values():
            yield from instruction.leaves()

    def called_computations(self, attribute: str) -> list["Computation"]:
        """Returns the computations that an attribute such as "calls" names, if any."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        names = re.findall(r"[\w.\-]+", match.group(1)) if match else []
        return [self.computation.program.computations[name] for name in names]

    def int_attribute(self, attribute: str) -> int | None:
        """Returns the value of an attribute such as "index", or None."""
        match = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(match.group(1)) if match else None


@dataclasses.dataclass(eq=False, repr=False)
class Computation:
    """One computation: its instructions by name, in order, and the one that computes its result."""

    name: str
    program: "Program"
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction = dataclasses.field(init=False)

    @property
    def parameters(self) -> list[Instruction]:
        """Parameters in order."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.operand_text))


@dataclasses.dataclass(eq=False, repr=False)
class Program:
    """A compiled program: its computations by name, and the one that it starts with."""

    computations: dict[str, Computation] = dataclasses.field(default_factory=dict)
    entry: str = ""

    def executed_instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Yields the instructions that the device executes, and how often per call of the program.

        A fusion is one instruction. Loops and calls are yielded as their bodies. The body of a loop
        with a data-dependent length, such as rejection sampling, is yielded once; see
        `unknown_trip_count_loops`.
        """
        yield from _iter_executed(self.computations[self.entry], 1)

    def unknown_trip_count_loops(self) -> list[str]:
        """Returns the names of loops with matmuls or collectives whose trip count is unknown.

        `executed_instructions` yields their bodies once, and so undercounts them.
        """
        return [
            loop.name
            for computation in self.computations.values()
            for loop in computation.instructions.values()
            if loop.opcode == "while"
            and trip_count(loop) is None
            and any(map(_has_matmul_or_collective, loop.bodies))
        ]


def _iter_executed(
    computation: Computation, num_executions: int
) -> Iterator[tuple[Instruction, int]]:
    for instruction in computation.instructions.values():
        bodies, body_executions = instruction.bodies, num_executions
        if instruction.opcode == "while":
            count = trip_count(instruction)
            body_executions = num_executions * (1 if count is None else count)
        if not body_executions:
            continue
        for body in bodies:
            yield from _iter_executed(body, body_executions)
        if not bodies:
            yield instruction, num_executions


def _has_matmul_or_collective(computation: Computation) -> bool:
    return any(
        _MATMUL_OR_COLLECTIVE.fullmatch(instruction.opcode)
        or any(
            map(
                _has_matmul_or_collective,
                [*instruction.bodies, *instruction.called_computations("calls")],
            )
        )
        for instruction in computation.instructions.values()
    )


def trip_count(loop: Instruction) -> int | None:
    """Returns the trip count of a loop that counts up to a constant; None for other loops."""
    if known := _KNOWN_TRIP_COUNT.search(loop.attributes):
        return int(known.group(1))
    (condition,) = loop.called_computations("condition")
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = map(_source, test.operands)
    if counter.opcode != "get-tuple-element":
        return None
    index = counter.int_attribute("index") or 0
    start, stop = _initial_value(loop, index), _constant_value(limit)
    if stop is None and limit.opcode == "get-tuple-element":
        stop = _initial_value(loop, limit.int_attribute("index") or 0)
    step = _step(loop, index)
    if start is None or stop is None or not step:
        return None
    return max(0, -(-(stop - start) // step))


def _initial_value(loop: Instruction, index: int) -> int | None:
    (init,) = loop.operands
    return _constant_value(_source(init.operands[index])) if init.opcode == "tuple" else None


def _step(loop: Instruction, index: int) -> int | None:
    """Returns the number that each iteration adds to an element of a loop's state."""
    (body,) = loop.bodies
    if body.root.opcode != "tuple":
        return None
    update = _source(body.root.operands[index])
    if update.opcode == "fusion":
        update = _source(update.fused_computation.root)
    if update.opcode != "add":
        return None
    steps = [_constant_value(_source(operand)) for operand in update.operands]
    return next((step for step in steps if step is not None), None)


def _source(instruction: Instruction) -> Instruction:
    """Returns the instruction that computes a value, skipping those that only pass it on."""
    while instruction.opcode in _FORWARDING:
        instruction = instruction.operands[0]
    return instruction


def _constant_value(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operand_text):
        return None
    return int(instruction.operand_text)


def parse_program(text: str) -> Program:
    """Parses the text of a compiled program, such as `compiled.as_text()`."""
    program, current = Program(), None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = Computation(match.group(2), program)
            program.computations[current.name] = current
            program.entry = current.name if match.group(1) else program.entry
        elif line.startswith("}"):
            current = None
        elif current and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match.group(2), line[match.end() :], current)
            current.instructions[instruction.name] = instruction
            if match.group(1):
                current.root = instruction
    return program


def _parse_instruction(name: str, text: str, computation: Computation) -> Instruction:
    """Parses the part of a line after the equals sign; operands come on earlier lines."""
    type_end = _closing_parenthesis(text, 0) + 1 if text.startswith("(") else text.index(" ")
    match = _OPCODE.match(text, type_end)
    assert match is not None, text
    opcode = match.group(1)
    closing = _closing_parenthesis(text, match.end() - 1)
    operand_text = text[match.end() : closing]
    outputs = tuple(map(_parse_array, _ARRAY.finditer(text[:type_end])))
    instruction = Instruction(name, opcode, outputs, operand_text, text[closing + 1 :], computation)
    names = [] if opcode == "constant" else _NAME.findall(operand_text)
    instruction.operands = [computation.instructions[name] for name in names]
    for operand in dict.fromkeys(instruction.operands):
        operand.users.append(instruction)
    return instruction


def _closing_parenthesis(text: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    raise ValueError(f"unbalanced parenthesis in {text[:80]!r}")


def _parse_array(match: re.Match[str]) -> ArrayType:
    dtype, dims, layout = match.groups()
    order, _, details = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", details)
    memory_space = re.search(r"S\((\d+)\)", details)
    return ArrayType(
        dtype,
        parse_ints(dims.replace("<=", "")),
        parse_ints(order),
        parse_ints(tile.group(1)) if tile else (),
        int(memory_space.group(1)) if memory_space else 0,
    )


def parse_ints(text: str) -> tuple[int, ...]:
    """Parses integers separated by commas."""
    return tuple(int(number) for number in text.split(",") if number.strip())
