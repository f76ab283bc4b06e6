"""Layouts of published weights as data. Does not import JAX.

Parameters have the names of the authors' code, with those of all blocks stacked on a leading axis.
Every tensor of a published layout is a part of one parameter, with its axes in another order.
"""

import dataclasses
from typing import NamedTuple


class TensorMapping(NamedTuple):
    """One tensor of a layout, or one per block.

    Attributes:
        name: Name of the tensor; {} is replaced by the index of its block.
        path: Slash-separated path of the parameter.
        axes: Order of the parameter's axes in the tensor; None: the same.
    """

    name: str
    path: str
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Names and axes of published weights.

    Attributes:
        name: Name for people.
        tensors: All tensors; those of the head may be absent.
        signature_keys: Names of tensors that no layout of another family has.
        gelu: GELU that these weights are used with.
        eval_crop: Evaluation crop that these weights are used with.
    """

    name: str
    tensors: tuple[TensorMapping, ...]
    signature_keys: tuple[str, ...]
    gelu: str
    eval_crop: str
