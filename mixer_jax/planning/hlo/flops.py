"""FLOPs of the matrix products that a compiled program executes."""

import math
import re
from collections.abc import Iterator

from mixer_jax.planning.hlo.instruction import Instruction
from mixer_jax.planning.hlo.program import Computation, ExecutedInstruction, Program

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# What a kernel written by hand says of itself.
_ESTIMATE = re.compile(r'cost_estimate":\{[^}]*"flops":"(\d+)"')


def iter_matmul_flops(program: Program) -> Iterator[tuple[ExecutedInstruction, float]]:
    """Yields what the device runs and the FLOPs of the products in all of its times.

    A multiplication and its addition are two FLOPs. What is not a product, such as GELU, is not
    counted; a kernel written by hand counts as much as its `cost_estimate` says.

    Args:
        program: from `read_program`.
    """
    for run in program.runs():
        yield run, run.times * _flops(program, run.computation, run.instruction)


def iter_matmuls(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Instruction, float]]:
    """Yields the matrix products in an instruction, a fusion's by what it calls, and their FLOPs.

    Args:
        program: that holds it.
        computation: that it stands in.
        instruction: of it.
    """
    if instruction.opcode == "dot":
        yield instruction, _dot_flops(computation, instruction)
    elif instruction.opcode == "convolution":
        yield instruction, _convolution_flops(computation, instruction)
    elif called := instruction.opcode == "fusion" and instruction.computation("calls"):
        inside = program.computations[called]
        for inner in inside.instructions.values():
            yield from iter_matmuls(program, inside, inner)


def _flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "custom-call":
        said = _ESTIMATE.search(instruction.attributes)
        return float(said.group(1)) if said else 0.0
    return sum(flops for _, flops in iter_matmuls(program, computation, instruction))


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    left = computation.instructions[dot.operands[0]].arrays[0]
    found = _CONTRACTING.search(dot.attributes)
    axes = found.group(1).split(",") if found else []
    summed = math.prod(left.dims[int(axis)] for axis in axes if axis)
    return 2.0 * dot.arrays[0].size * summed


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Returns the FLOPs of a convolution, which TPUs make of every product.

    Places where the window lies over padding, or over holes that dilation leaves, are free: so the
    compiler writes products with batch axes.
    """
    labels = _LABELS.search(convolution.attributes)
    assert labels is not None, convolution.attributes
    of_input, of_kernel, of_output = labels.groups()
    image, kernel = (computation.instructions[name].arrays[0] for name in convolution.operands)
    output = convolution.arrays[0]
    window = _WINDOW.search(convolution.attributes)
    said = dict(part.split("=") for part in window.group(1).split()) if window else {}
    places = 1
    for number, axis in enumerate(sorted(label for label in of_output if label.isdigit())):
        settings = {name: text.split("x")[number] for name, text in said.items()}
        places *= _places(
            image.dims[of_input.index(axis)], output.dims[of_output.index(axis)], settings
        )
    outputs = math.prod(output.dims[of_output.index(label)] for label in "bf")
    return 2.0 * places * outputs * kernel.dims[of_kernel.index("i")]


def _places(inputs: int, outputs: int, window: dict[str, str]) -> int:
    """Returns how often a window's elements meet one of the input's, over all outputs.

    Args:
        inputs: of the input along one axis.
        outputs: of the output.
        window: its settings along that axis.
    """
    size, stride = int(window.get("size", 1)), int(window.get("stride", 1))
    before = int(window.get("pad", "0_0").split("_")[0])
    holes, spread = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    places = (
        output * stride + element * spread - before
        for output in range(outputs)
        for element in range(size)
    )
    return sum(0 <= place < inputs * holes and place % holes == 0 for place in places)
