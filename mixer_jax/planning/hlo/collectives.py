"""What the devices of a compiled program send each other in one call of it."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from mixer_jax.planning.hlo.instruction import Instruction
from mixer_jax.planning.hlo.program import Computation, Program
from mixer_jax.planning.hlo.replica_groups import Groups, mesh_axis_of, read_groups, read_pairs
from mixer_jax.planning.hlo.tensor_roles import ACTIVATIONS, SUMS, TensorRoles

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# XLA's name for an all-reduce of which each device keeps a part, and so need not finish.
_SUM_AND_SPLIT = "all-reduce-scatter"
# A collective spread over several fusions appears in each of them.
_SPREAD = "async_collective_fusion_config"
# Between slices the host sends, by a runtime of that name.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
    """Collectives of one kind that carry the same sort of thing along the same axis.

    Attributes:
        kind: e.g. "all-reduce".
        dtype: of the elements.
        axis: of the mesh, "all" for both, "slices" between slices, or "other".
        carries: what, as `carried` names it.
        times: how often in a step.
        num_bytes: of payload in a step, per device: the whole array that is summed, gathered,
            scattered or sent on, not what the algorithm moves.
        groups: of devices, numbered row by row over the mesh.
    """

    kind: str
    dtype: str
    axis: str
    carries: str
    times: int
    num_bytes: float
    groups: Groups

    @property
    def is_unexpected(self) -> bool:
        """Whether a data-parallel step should not send this."""
        return self.carries == ACTIVATIONS


class _Found(NamedTuple):
    """A collective in the text, with the name of the computation that it stands in."""

    computation: Computation
    instruction: Instruction
    times: int


def find_collectives(
    program: Program, mesh: dict[str, int], known: TensorRoles, slices: int = 1
) -> list[Collective]:
    """Returns what a program sends, the largest first.

    Args:
        program: from `read_program`; of several slices, that of each.
        mesh: sizes of its axes by name, in the order that the program numbers devices in.
        known: what it may carry.
        slices: that the first axis of the mesh goes over.
    """
    first, *others = mesh
    in_slice = {first: mesh[first] // slices} | {name: mesh[name] for name in others}
    together: dict[tuple[str, str, str, str, Groups], tuple[int, float]] = {}
    for found in _collectives(program):
        kind = _kind(found)
        axis, groups = _along(found, kind, in_slice, slices)
        if axis == "none":
            continue  # Every device for itself.
        for (dtype, carries), num_bytes in _payload(found, kind, groups, known).items():
            if not num_bytes:
                continue  # A token.
            key = (kind, dtype, axis, carries, groups)
            times, total = together.get(key, (0, 0.0))
            together[key] = (times + found.times, total + found.times * num_bytes)
    made = [
        Collective(kind, dtype, axis, carries, times, total, groups)
        for (kind, dtype, axis, carries, groups), (times, total) in together.items()
    ]
    return sorted(made, key=lambda transfer: -transfer.num_bytes)


def _along(found: _Found, kind: str, mesh: dict[str, int], slices: int) -> tuple[str, Groups]:
    """Returns the axis that a collective goes along, and its groups of devices."""
    attributes, size = found.instruction.attributes, math.prod(mesh.values())
    if found.instruction.opcode == "send":
        return "slices", (tuple(range(0, size * slices, size)),)
    is_permute = kind == "collective-permute"
    groups = read_pairs(attributes) if is_permute else read_groups(attributes, size)
    return mesh_axis_of(groups, mesh, pairs=is_permute), groups


def _payload(
    found: _Found, kind: str, groups: Groups, known: TensorRoles
) -> dict[tuple[str, str], float]:
    """Returns the bytes of one collective by type of the elements and by what they are."""
    parts = len(groups[0]) if kind == "all-gather" else 1
    instructions, collective = found.computation.instructions, found.instruction
    arrays = [array for name in collective.operands for array in instructions[name].arrays]
    if kind in SUMS and len(collective.arrays) == len(arrays):
        # TPUs sum in the type of the sum, whatever that of the terms.
        pairs = zip(arrays, collective.arrays, strict=True)
        arrays = [array._replace(dtype=total.dtype) for array, total in pairs]
    payload: defaultdict[tuple[str, str], float] = defaultdict(float)
    for array in arrays:
        payload[array.dtype, known.name(kind, array)] += parts * array.num_bytes
    return payload


def _collectives(program: Program) -> Iterator[_Found]:
    """Yields the collectives that the device runs, each once, also those inside of fusions."""
    spread: set[str] = set()
    for computation, instruction, times in program.runs():
        if _base(instruction):
            yield _Found(computation, instruction, times)
        elif instruction.opcode == "fusion":
            for found in _inside(program, instruction, times):
                if _SPREAD in found.instruction.attributes:
                    identity = _identity(found.instruction)
                    if identity in spread:
                        continue
                    spread.add(identity)
                yield found


def _inside(program: Program, fusion: Instruction, times: int) -> Iterator[_Found]:
    computation = program.computations[fusion.computation("calls")]
    for instruction in computation.instructions.values():
        if _base(instruction):
            yield _Found(computation, instruction, times)
        elif instruction.opcode == "fusion":
            yield from _inside(program, instruction, times)


def _identity(collective: Instruction) -> str:
    """Returns what the parts of a collective spread over fusions have in common."""
    chain = re.search(r'chain_id="(\w+)"', collective.attributes)
    dims = [array.dims for array in collective.arrays]
    return f"{collective.number('channel_id')} {chain and chain.group(1)} {dims}"


def _base(instruction: Instruction) -> str:
    """Returns the kind of collective that an instruction begins, or ""."""
    if instruction.opcode == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
        return found.group(1).lower().replace("_", "-")
    base = instruction.opcode.removesuffix("-start")
    return base if base in KINDS else ""


def _kind(found: _Found) -> str:
    if found.computation.name.startswith(_SUM_AND_SPLIT):
        return "reduce-scatter"
    return _base(found.instruction)
