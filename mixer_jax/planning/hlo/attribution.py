"""Attribution of a compiled program's instructions to regions of the model.

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

import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mixer_jax.planning.hlo.flops import iter_matmuls
from mixer_jax.planning.hlo.program import Computation, ExecutedInstruction, Instruction, Program
from mixer_jax.planning.hlo.traffic import copied_array

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
# From an instruction to the names of its producers or consumers.
_Neighbors = Callable[[Computation, Instruction], Sequence[str]]


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
    program: Program,
    costs: Iterable[tuple[ExecutedInstruction, float]],
    regions: Mapping[str, str],
) -> dict[str, float]:
    """Sums the costs of a program by region, including regions without any.

    Args:
        program: Compiled program.
        costs: Executed instructions and their costs, as from `iter_hbm_bytes` or
            `iter_matmul_flops`.
        regions: Patterns of the model's regions, by name.
    """
    attribution = RegionAttribution(program, regions)
    totals = dict.fromkeys([*regions, OPTIMIZER, OTHER], 0.0)
    for executed, cost in costs:
        totals[attribution.region_of(executed)] += cost
    return totals


class RegionAttribution:
    """Region of each instruction of a program.

    Attributes:
        program: Compiled program.
        regions: Patterns of the model's regions, by name.
    """

    def __init__(self, program: Program, regions: Mapping[str, str]):
        self.program = program
        self.regions = regions
        self._consumers_by_computation: dict[str, dict[str, list[str]]] = {}

    def region_of(self, executed: ExecutedInstruction) -> str:
        """Returns the region of an executed instruction."""
        computation, instruction, _ = executed
        region = self._own_region(computation, instruction)
        if region != OTHER or not self._is_data_movement(instruction):
            return region
        directions = [self._consumers, self._producers]
        loads_chip = instruction.outputs and copied_array(instruction).memory_space
        if not loads_chip:
            directions.reverse()
        nearest = (self._nearest_region(computation, instruction, d) for d in directions)
        return next((region for region in nearest if region != OTHER), OTHER)

    def _own_region(self, computation: Computation, instruction: Instruction) -> str:
        """Returns the region of an instruction by what it contains and its name."""
        matmuls = list(iter_matmuls(self.program, computation, instruction))
        if matmuls:
            largest, _ = max(matmuls, key=lambda item: item[1])
            if (region := region_of_op(largest.op_name, self.regions)) != OTHER:
                return region
        if instruction.opcode == "fusion":
            elements: Counter[str] = Counter()
            for inner in self._fused_instructions(instruction):
                if (region := region_of_op(inner.op_name, self.regions)) != OTHER:
                    elements[region] += sum(array.size for array in inner.outputs)
            if elements:
                return elements.most_common(1)[0][0]
        return region_of_op(instruction.op_name, self.regions)

    def _fused_instructions(self, fusion: Instruction) -> Iterator[Instruction]:
        fused = self.program.computations[fusion.called_computation("calls")]
        for inner in fused.instructions.values():
            if inner.opcode == "fusion":
                yield from self._fused_instructions(inner)
            elif inner.opcode != "parameter":
                yield inner

    def _is_data_movement(self, instruction: Instruction) -> bool:
        """Returns whether an instruction computes nothing, except perhaps scalars as indices."""
        if instruction.opcode != "fusion":
            return bool(_DATA_MOVEMENT.fullmatch(instruction.opcode))
        return all(
            _DATA_MOVEMENT.fullmatch(inner.opcode)
            or all(array.size == 1 for array in inner.outputs)
            for inner in self._fused_instructions(instruction)
        )

    def _nearest_region(
        self, computation: Computation, instruction: Instruction, neighbors: _Neighbors
    ) -> str:
        """Returns the region of the nearest instruction that has one, through data movement."""
        seen, queue = {instruction.name}, deque(neighbors(computation, instruction))
        while queue:
            name = queue.popleft()
            if name in seen:
                continue
            seen.add(name)
            neighbor = computation.instructions[name]
            if (region := self._own_region(computation, neighbor)) != OTHER:
                return region
            if self._is_data_movement(neighbor):
                queue.extend(neighbors(computation, neighbor))
        return OTHER

    def _producers(self, _: Computation, instruction: Instruction) -> Sequence[str]:
        return instruction.operands

    def _consumers(self, computation: Computation, instruction: Instruction) -> Sequence[str]:
        consumers = self._consumers_by_computation.get(computation.name)
        if consumers is None:
            consumers = defaultdict(list)
            for consumer in computation.instructions.values():
                for name in consumer.operands:
                    consumers[name].append(consumer.name)
            self._consumers_by_computation[computation.name] = consumers
        return consumers[instruction.name]
