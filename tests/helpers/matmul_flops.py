"""FLOPs of the matmuls in a traced function."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_matmul_flops(jaxpr: Jaxpr) -> int:
    """Counts the FLOPs of matmuls and convolutions, also in scans and rematerialized functions."""
    flops = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            result: Any = equation.outvars[0].aval
            lhs: Any = equation.invars[0].aval
            contracted_size = math.prod(lhs.shape[axis] for axis in contracted)
            flops += 2 * math.prod(result.shape) * contracted_size
        elif name == "conv_general_dilated":
            output: Any = equation.outvars[0].aval
            kernel: Any = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            flops += 2 * math.prod(output.shape) * (math.prod(kernel.shape) // outputs)
        repeats = params["length"] if name == "scan" else 1
        flops += repeats * sum(map(count_matmul_flops, iter_jaxprs(list(params.values()))))
    return flops


def iter_jaxprs(values: list[Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs in an equation's parameters."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from iter_jaxprs(list(value))
