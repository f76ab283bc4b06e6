"""Which part of a Mixer an instruction of a compiled program belongs to.

The compiler notes of every instruction which modules and scopes its code stands in, for instance
`jit(train_step)/jvp(MlpMixer)/MixerBlock/vmap(vmap(token_mixing))/Dense_0/dot_general`. The rule,
in this order:

1. A fusion with matrix products belongs where the largest of them does: what else it holds, such as
   a LayerNorm on the way in or a GELU on the way out, costs no traffic of its own.
2. Any other fusion belongs where most of the elements that are computed in it do.
3. Anything else belongs where its own name says.
4. What has no such name and only brings numbers elsewhere, such as a copy that the compiler adds,
   belongs to what uses them, where it brings them onto the chip, and else to what made them.
5. What is left, such as a residual connection that stands alone, is "other".
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from mixer_jax.planning.hlo.flops import iter_matmuls
from mixer_jax.planning.hlo.instruction import Instruction
from mixer_jax.planning.hlo.program import Computation, ExecutedInstruction, Program
from mixer_jax.planning.hlo.traffic import copied_array

TOKEN_MIXING, CHANNEL_MIXING, LAYER_NORM = "token mixing", "channel mixing", "LayerNorm"
STEM, HEAD, OPTIMIZER, OTHER = "stem", "head and loss", "optimizer", "other"
REGIONS = (STEM, TOKEN_MIXING, CHANNEL_MIXING, LAYER_NORM, HEAD, OPTIMIZER, OTHER)

# By what a name holds, the first that does: an argument of the optimizer is named after a module,
# and what a training step does outside of modules and of what it differentiates is the update.
_NAMES = {
    OPTIMIZER: re.compile(r"\boptimizer\b|opt_state|^jit\(\w*step\)/(?!.*jvp\()"),
    # Only token mixing needs its axes in another order.
    TOKEN_MIXING: re.compile(r"token_mixing|block_\d+/transpose"),
    CHANNEL_MIXING: re.compile("channel_mixing"),
    LAYER_NORM: re.compile("LayerNorm|layer_norm"),
    STEM: re.compile(r"\bstem\b|\bimage\b"),
    HEAD: re.compile(r"\b(head|loss|label)\b|log_sigmoid|log_softmax"),
}
# From an instruction to names of those before, or behind, it.
_Way = Callable[[Computation, Instruction], Sequence[str]]
# What only brings numbers elsewhere, or names them.
_MOVES = re.compile(
    "(async|bitcast|copy|dynamic-slice|dynamic-update-slice|slice)(-start|-update|-done)?|"
    "constant|custom-call|get-tuple-element|parameter|reshape|transpose|tuple"
)


def region_of_op(op_name: str) -> str:
    """Returns the part of the model that an instruction's name tells of.

    Args:
        op_name: of an instruction; empty: "other".
    """
    return next((part for part, known in _NAMES.items() if known.search(op_name)), OTHER)


def sum_by_region(
    program: Program, counted: Iterable[tuple[ExecutedInstruction, float]]
) -> dict[str, float]:
    """Returns what was counted of a program, summed by part; every part is there.

    Args:
        program: that.
        counted: what it runs and a number of each, as from `moved` or `executed`.
    """
    parts, sums = RegionAttribution(program), dict.fromkeys(REGIONS, 0.0)
    for run, number in counted:
        sums[parts.of(run)] += number
    return sums


class RegionAttribution:
    """Tells the part of each instruction that a program, from `read_program`, runs."""

    def __init__(self, program: Program):
        self._program = program
        self._users: dict[str, dict[str, list[str]]] = {}

    def of(self, run: ExecutedInstruction) -> str:
        """Returns the part of what a program runs."""
        computation, instruction, _ = run
        part = self._own(computation, instruction)
        if part != OTHER or not self._only_moves(instruction):
            return part
        ways = [self._used_by, self._made_by]
        if not (instruction.arrays and copied_array(instruction).space):
            ways.reverse()
        found = (self._along(computation, instruction, way) for way in ways)
        return next((part for part in found if part != OTHER), OTHER)

    def _own(self, computation: Computation, instruction: Instruction) -> str:
        """Returns the part that an instruction tells of by itself."""
        found = list(iter_matmuls(self._program, computation, instruction))
        if found:
            largest, _ = max(found, key=lambda item: item[1])
            if (part := region_of_op(largest.op_name)) != OTHER:
                return part
        if instruction.opcode == "fusion":
            votes: Counter[str] = Counter()
            for inner in self._inside(instruction):
                if (part := region_of_op(inner.op_name)) != OTHER:
                    votes[part] += sum(array.size for array in inner.arrays)
            if votes:
                return votes.most_common(1)[0][0]
        return region_of_op(instruction.op_name)

    def _inside(self, fusion: Instruction) -> Iterator[Instruction]:
        """Yields what a fusion computes, without what it is given."""
        for inner in self._program.computations[fusion.computation("calls")].instructions.values():
            if inner.opcode == "fusion":
                yield from self._inside(inner)
            elif inner.opcode != "parameter":
                yield inner

    def _only_moves(self, instruction: Instruction) -> bool:
        """Returns whether an instruction computes nothing, but perhaps where numbers lie."""
        if instruction.opcode != "fusion":
            return bool(_MOVES.fullmatch(instruction.opcode))
        return all(
            _MOVES.fullmatch(inner.opcode) or all(array.size == 1 for array in inner.arrays)
            for inner in self._inside(instruction)
        )

    def _along(self, computation: Computation, instruction: Instruction, way: _Way) -> str:
        """Returns the part of the nearest instruction one way that has one."""
        seen, due = {instruction.name}, deque(way(computation, instruction))
        while due:
            name = due.popleft()
            if name in seen:
                continue
            seen.add(name)
            found = computation.instructions[name]
            if (part := self._own(computation, found)) != OTHER:
                return part
            if self._only_moves(found):
                due.extend(way(computation, found))
        return OTHER

    def _made_by(self, _: Computation, instruction: Instruction) -> Sequence[str]:
        return instruction.operands

    def _used_by(self, computation: Computation, instruction: Instruction) -> Sequence[str]:
        users = self._users.get(computation.name)
        if users is None:
            users = self._users[computation.name] = defaultdict(list)
            for user in computation.instructions.values():
                for name in user.operands:
                    users[name].append(user.name)
        return users[instruction.name]
