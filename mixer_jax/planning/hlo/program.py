"""The text of a compiled XLA program, read: computations, instructions, and how often they run."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mixer_jax.planning.hlo.instruction import Instruction, read_instruction

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
_PRODUCTS_AND_COLLECTIVES = re.compile(
    r"dot|convolution|(all-|reduce-scatter|collective-|ragged-all-|send).*"
)
# What only passes a value on, for finding where it is from.
_PASSING = {"copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"}


class Computation(NamedTuple):
    """One computation: instructions by name, and which of them is its value."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @property
    def parameters(self) -> list[str]:
        """Names of its parameters, in their order."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return [i.name for i in sorted(found, key=lambda i: int(i.literal))]


class ExecutedInstruction(NamedTuple):
    """An instruction that the device runs, and how often in one call of the program."""

    computation: Computation
    instruction: Instruction
    times: int


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that is the program.
    """

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> Iterator[ExecutedInstruction]:
        """Yields what the device runs; fusions whole, loops and calls by their bodies.

        The body of a loop whose length follows from data, such as a rejection sampler's, is
        yielded once; see `uncounted`.
        """
        yield from self._runs(self.computations[self.entry], 1)

    def _runs(self, computation: Computation, times: int) -> Iterator[ExecutedInstruction]:
        for instruction in computation.instructions.values():
            bodies, inner = self._bodies(instruction), times
            if instruction.opcode == "while":
                trips = self.trips(computation, instruction)
                inner = times * (1 if trips is None else trips)
            if not inner:
                continue
            for body in bodies:
                yield from self._runs(self.computations[body], inner)
            if not bodies:
                yield ExecutedInstruction(computation, instruction, times)

    def uncounted(self) -> list[str]:
        """Returns names of loops that run nobody knows how often, and hold what matters.

        That is products or collectives: `runs` yields them once, and so too seldom.
        """
        return [
            loop.name
            for computation in self.computations.values()
            for loop in computation.instructions.values()
            if loop.opcode == "while"
            and self.trips(computation, loop) is None
            and self._matters(loop.computation("body"))
        ]

    def _matters(self, name: str) -> bool:
        inside = self.computations[name].instructions.values()
        called = [body for i in inside for body in [*self._bodies(i), i.computation("calls")]]
        return any(_PRODUCTS_AND_COLLECTIVES.fullmatch(i.opcode) for i in inside) or any(
            self._matters(body) for body in called if body
        )

    def _bodies(self, instruction: Instruction) -> list[str]:
        if instruction.opcode == "while":
            return [instruction.computation("body")]
        if instruction.opcode == "call":
            return [instruction.computation("to_apply")]
        if instruction.opcode == "async-start":
            return [instruction.computation("calls")]
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            if branches:
                return _NAME.findall(branches.group(1))
            return [instruction.computation(f"{side}_computation") for side in ("true", "false")]
        return []

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often a loop runs, where the program says so: it counts up to a constant."""
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        condition = self.computations[loop.computation("condition")]
        root = condition.instructions[condition.root]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (_origin(condition, name) for name in root.operands)
        if counter is None or counter.opcode != "get-tuple-element" or limit is None:
            return None
        index = counter.number("index") or 0
        first = self._initially(computation, loop, index)
        last = _constant(limit)
        if last is None and limit.opcode == "get-tuple-element":
            last = self._initially(computation, loop, limit.number("index") or 0)
        step = self._step(self.computations[loop.computation("body")], index)
        if first is None or last is None or not step:
            return None
        return max(0, -(-(last - first) // step))

    def _initially(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        start = computation.instructions[loop.operands[0]]
        if start.opcode != "tuple":
            return None
        return _constant(_origin(computation, start.operands[index]))

    def _step(self, body: Computation, index: int) -> int | None:
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return None
        after = _origin(body, root.operands[index])
        inside = body
        if after is not None and after.opcode == "fusion":
            inside = self.computations[after.computation("calls")]
            after = _origin(inside, inside.root)
        if after is None or after.opcode != "add":
            return None
        steps = [_constant(_origin(inside, name)) for name in after.operands]
        return next((step for step in steps if step is not None), None)


def _origin(computation: Computation, name: str) -> Instruction | None:
    """Returns the instruction that a value is from, through those that only pass it on."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in _PASSING:
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def read_program(text: str) -> Program:
    """Returns the program that a text such as `compiled.as_text()` holds."""
    computations: dict[str, Computation] = {}
    entry, open_name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if found := _HEADER.match(line):
            open_name, instructions, root = found.group(2), {}, ""
            entry = open_name if found.group(1) else entry
        elif line.startswith("}") and open_name:
            computations[open_name] = Computation(open_name, instructions, root)
            open_name = ""
        elif open_name and (found := _INSTRUCTION.match(line)):
            instruction = read_instruction(found.group(2), line[found.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if found.group(1) else root
    return Program(computations, entry)
