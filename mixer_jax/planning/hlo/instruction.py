"""One instruction of a compiled XLA program, read from its line: types, operands, attributes."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class ArrayType(NamedTuple):
    """The type of one array of a program.

    Attributes:
        dtype: as XLA writes it, e.g. "bf16".
        dims: sizes of its axes.
        order: axes from the fastest to the slowest.
        tile: sizes of the first tile of its layout, over its fastest axes; empty: not tiled.
        space: memory it lies in; 0 is the main memory of the device (HBM).
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
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
        """Bytes of its elements."""
        return self.size * self.itemsize

    @property
    def padded_bytes(self) -> float:
        """Bytes that it takes in memory, where whole tiles cover it."""
        order = self.order or tuple(reversed(range(len(self.dims))))
        sides = [self.dims[axis] for axis in reversed(order)]
        for place, side in enumerate(reversed(self.tile), start=1):
            if place <= len(sides):
                sides[-place] = -(-sides[-place] // side) * side
        return math.prod(sides) * self.itemsize


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: of it and of its value.
        opcode: e.g. "fusion".
        arrays: of its value; those of a tuple in their order.
        operands: names of the values it takes.
        literal: what stands in its parentheses.
        attributes: all that stands behind them.
    """

    name: str
    opcode: str
    arrays: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Where the code that it is of stands: modules and scopes, then what is computed, or ""."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    def computation(self, attribute: str) -> str:
        """Returns the name of the computation in an attribute such as "calls", or ""."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    def number(self, attribute: str) -> int | None:
        """Returns a number in an attribute such as "index", or None."""
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found.group(1)) if found else None


def read_instruction(name: str, text: str) -> Instruction:
    """Returns the instruction of a line.

    Args:
        name: of its value.
        text: all that stands behind the equals sign.
    """
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    found = _OPCODE.match(text, end)
    assert found is not None, text
    closing = _closing(text, found.end() - 1)
    literal = text[found.end() : closing]
    operands = () if found.group(1) == "constant" else tuple(_NAME.findall(literal))
    arrays = tuple(map(_read_array, _ARRAY.finditer(text[:end])))
    return Instruction(name, found.group(1), arrays, operands, literal, text[closing + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")


def _read_array(found: re.Match[str]) -> ArrayType:
    dtype, dims, layout = found.groups()
    order, _, details = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", details)
    space = re.search(r"S\((\d+)\)", details)
    return ArrayType(
        dtype,
        _numbers(dims.replace("<=", "")),
        _numbers(order),
        _numbers(tile.group(1)) if tile else (),
        int(space.group(1)) if space else 0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))
