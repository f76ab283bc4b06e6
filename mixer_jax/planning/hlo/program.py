"""Compiled XLA programs, parsed from their text, with the number of times each instruction runs."""

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


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: Name of the instruction and of its result.
        opcode: Operation, e.g. "fusion".
        outputs: Arrays of the result; the elements of a tuple in order.
        operands: Names of the operands.
        operand_text: Text between the parentheses.
        attributes: Text after the parentheses.
    """

    name: str
    opcode: str
    outputs: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    operand_text: str
    attributes: str

    @property
    def op_name(self) -> str:
        """JAX name stack of the source operation: modules, scopes, primitive; "" if unknown."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""

    def called_computation(self, attribute: str) -> str:
        """Returns the computation that an attribute such as "calls" names, or ""."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""

    def int_attribute(self, attribute: str) -> int | None:
        """Returns the value of an attribute such as "index", or None."""
        match = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(match.group(1)) if match else None


class Computation(NamedTuple):
    """One computation: its instructions by name, and the name of the root instruction."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, in order."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.operand_text))]


class ExecutedInstruction(NamedTuple):
    """An instruction that the device executes, and how many times per call of the program."""

    computation: Computation
    instruction: Instruction
    num_executions: int


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: Computations by name.
        entry: Name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str

    def executed_instructions(self) -> Iterator[ExecutedInstruction]:
        """Yields the executed instructions: a fusion as one, loops and calls by their bodies.

        The body of a loop with a data-dependent length, such as rejection sampling, is yielded
        once; see `unknown_trip_count_loops`.
        """
        yield from self._executed(self.computations[self.entry], 1)

    def _executed(
        self, computation: Computation, num_executions: int
    ) -> Iterator[ExecutedInstruction]:
        for instruction in computation.instructions.values():
            bodies, body_executions = self._bodies(instruction), num_executions
            if instruction.opcode == "while":
                trip_count = self.trip_count(computation, instruction)
                body_executions = num_executions * (1 if trip_count is None else trip_count)
            if not body_executions:
                continue
            for body in bodies:
                yield from self._executed(self.computations[body], body_executions)
            if not bodies:
                yield ExecutedInstruction(computation, instruction, num_executions)

    def unknown_trip_count_loops(self) -> list[str]:
        """Returns the names of loops with matmuls or collectives whose trip count is unknown.

        `executed_instructions` yields their bodies once, and so undercounts them.
        """
        return [
            loop.name
            for computation in self.computations.values()
            for loop in computation.instructions.values()
            if loop.opcode == "while"
            and self.trip_count(computation, loop) is None
            and self._has_matmul_or_collective(loop.called_computation("body"))
        ]

    def _has_matmul_or_collective(self, name: str) -> bool:
        instructions = self.computations[name].instructions.values()
        called = [
            body
            for instruction in instructions
            for body in [*self._bodies(instruction), instruction.called_computation("calls")]
        ]
        return any(_MATMUL_OR_COLLECTIVE.fullmatch(i.opcode) for i in instructions) or any(
            self._has_matmul_or_collective(body) for body in called if body
        )

    def _bodies(self, instruction: Instruction) -> list[str]:
        if instruction.opcode == "while":
            return [instruction.called_computation("body")]
        if instruction.opcode == "call":
            return [instruction.called_computation("to_apply")]
        if instruction.opcode == "async-start":
            return [instruction.called_computation("calls")]
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            if branches:
                return _NAME.findall(branches.group(1))
            return [
                instruction.called_computation(f"{case}_computation") for case in ("true", "false")
            ]
        return []

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns the trip count of a loop that counts up to a constant; None for other loops."""
        if known := _KNOWN_TRIP_COUNT.search(loop.attributes):
            return int(known.group(1))
        condition = self.computations[loop.called_computation("condition")]
        root = condition.instructions[condition.root]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (_source(condition, name) for name in root.operands)
        if counter is None or counter.opcode != "get-tuple-element" or limit is None:
            return None
        index = counter.int_attribute("index") or 0
        start = self._initial_value(computation, loop, index)
        stop = _constant_value(limit)
        if stop is None and limit.opcode == "get-tuple-element":
            stop = self._initial_value(computation, loop, limit.int_attribute("index") or 0)
        step = self._step(self.computations[loop.called_computation("body")], index)
        if start is None or stop is None or not step:
            return None
        return max(0, -(-(stop - start) // step))

    def _initial_value(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        init = computation.instructions[loop.operands[0]]
        if init.opcode != "tuple":
            return None
        return _constant_value(_source(computation, init.operands[index]))

    def _step(self, body: Computation, index: int) -> int | None:
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return None
        update, scope = _source(body, root.operands[index]), body
        if update is not None and update.opcode == "fusion":
            scope = self.computations[update.called_computation("calls")]
            update = _source(scope, scope.root)
        if update is None or update.opcode != "add":
            return None
        steps = [_constant_value(_source(scope, name)) for name in update.operands]
        return next((step for step in steps if step is not None), None)


def _source(computation: Computation, name: str) -> Instruction | None:
    """Returns the instruction that computes a value, skipping those that only pass it on."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in _FORWARDING:
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _constant_value(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.operand_text
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def parse_program(text: str) -> Program:
    """Parses the text of a compiled program, such as `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current, instructions, root = match.group(2), {}, ""
            entry = current if match.group(1) else entry
        elif line.startswith("}") and current:
            computations[current] = Computation(current, instructions, root)
            current = ""
        elif current and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match.group(2), line[match.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if match.group(1) else root
    return Program(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parses the part of a line after the equals sign."""
    type_end = _closing_parenthesis(text, 0) + 1 if text.startswith("(") else text.index(" ")
    match = _OPCODE.match(text, type_end)
    assert match is not None, text
    opcode = match.group(1)
    closing = _closing_parenthesis(text, match.end() - 1)
    operand_text = text[match.end() : closing]
    operands = () if opcode == "constant" else tuple(_NAME.findall(operand_text))
    outputs = tuple(map(_parse_array, _ARRAY.finditer(text[:type_end])))
    return Instruction(name, opcode, outputs, operands, operand_text, text[closing + 1 :])


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
        _parse_ints(dims.replace("<=", "")),
        _parse_ints(order),
        _parse_ints(tile.group(1)) if tile else (),
        int(memory_space.group(1)) if memory_space else 0,
    )


def _parse_ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))
