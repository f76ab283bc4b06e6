"""FLOPs of the matmuls that a compiled program executes."""

import math
import re
from collections.abc import Iterator

from mixer_jax.planning.hlo.program import Computation, ExecutedInstruction, Instruction, Program

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTING_DIMS = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# A custom kernel's own estimate.
_COST_ESTIMATE = re.compile(r'cost_estimate":\{[^}]*"flops":"(\d+)"')


def iter_matmul_flops(program: Program) -> Iterator[tuple[ExecutedInstruction, float]]:
    """Yields each executed instruction with the matmul FLOPs of all its executions.

    A multiply-add is two FLOPs. Element-wise operations such as GELU are not counted. A custom
    kernel counts with the FLOPs of its `cost_estimate`.
    """
    for executed in program.executed_instructions():
        computation, instruction, count = executed
        yield executed, count * _matmul_flops(program, computation, instruction)


def iter_matmuls(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, float]]:
    """Yields the matmuls in an instruction, including those inside a fusion, and their FLOPs.

    Args:
        program: Program with the computation.
        computation: Computation with the instruction.
        instruction: Instruction to search.
    """
    if instruction.opcode == "dot":
        yield instruction, _dot_flops(computation, instruction)
    elif instruction.opcode == "convolution":
        yield instruction, _convolution_flops(computation, instruction)
    elif called := instruction.opcode == "fusion" and instruction.called_computation("calls"):
        fused = program.computations[called]
        for inner in fused.instructions.values():
            yield from iter_matmuls(program, fused, inner)


def _matmul_flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "custom-call":
        estimate = _COST_ESTIMATE.search(instruction.attributes)
        return float(estimate.group(1)) if estimate else 0.0
    return sum(flops for _, flops in iter_matmuls(program, computation, instruction))


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    lhs = computation.instructions[dot.operands[0]].outputs[0]
    match = _CONTRACTING_DIMS.search(dot.attributes)
    axes = match.group(1).split(",") if match else []
    contracted = math.prod(lhs.dims[int(axis)] for axis in axes if axis)
    return 2.0 * dot.outputs[0].size * contracted


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Returns the FLOPs of a convolution, as which the TPU compiler writes every matmul.

    Window positions over padding, or over holes that dilation leaves, are free: the compiler
    writes matmuls with batch axes that way.
    """
    labels = _DIM_LABELS.search(convolution.attributes)
    assert labels is not None, convolution.attributes
    input_labels, kernel_labels, output_labels = labels.groups()
    image, kernel = (computation.instructions[name].outputs[0] for name in convolution.operands)
    output = convolution.outputs[0]
    match = _WINDOW.search(convolution.attributes)
    window = dict(item.split("=") for item in match.group(1).split()) if match else {}
    positions = 1
    for index, axis in enumerate(sorted(label for label in output_labels if label.isdigit())):
        positions *= _count_window_positions(
            image.dims[input_labels.index(axis)],
            output.dims[output_labels.index(axis)],
            {name: text.split("x")[index] for name, text in window.items()},
        )
    outputs = math.prod(output.dims[output_labels.index(label)] for label in "bf")
    return 2.0 * positions * outputs * kernel.dims[kernel_labels.index("i")]


def _count_window_positions(input_size: int, output_size: int, window: dict[str, str]) -> int:
    """Counts the pairs of an output and a window element that meet an element of the input.

    Args:
        input_size: Size of the input along one axis.
        output_size: Size of the output along it.
        window: Window settings along it.
    """
    size, stride = int(window.get("size", 1)), int(window.get("stride", 1))
    padding = int(window.get("pad", "0_0").split("_")[0])
    lhs_dilation, rhs_dilation = (int(window.get(f"{x}hs_dilate", 1)) for x in "lr")
    positions = (
        output * stride + element * rhs_dilation - padding
        for output in range(output_size)
        for element in range(size)
    )
    return sum(0 <= p < input_size * lhs_dilation and p % lhs_dilation == 0 for p in positions)
