"""What a collective carries, told from the shape of an array.

A guess, but one that can be wrong only where two arrays of a model have the same sides.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mixer_jax.planning.hlo.instruction import ArrayType

GRADIENTS = "gradients"
PARAMETERS = "parameters"
MIXUP_ROWS = "mixup rows"
SCALARS = "scalars"
ACTIVATIONS = "activations"

SUMS = {"all-reduce", "reduce-scatter"}
# Norms, losses, random keys: up to so many numbers are no array of the model.
_FEW = 16
_TILE = (8, 128)


class TensorRoles(NamedTuple):
    """The arrays that a model's collectives may carry, by their sides.

    Attributes:
        parameters: sides, sorted and without ones, of parameters, of parts of them, of blocks.
        sizes: numbers of elements of the same, for arrays that were laid out flat.
        rows: sides of one row of a batch.
        in_slices: whether there are several slices: sums over them are then cut into whole tiles,
            whose sides tell nothing.
    """

    parameters: frozenset[tuple[int, ...]]
    sizes: frozenset[int]
    rows: frozenset[tuple[int, ...]]
    in_slices: bool = False

    def name(self, kind: str, array: ArrayType) -> str:
        """Returns what an array is that a collective of this kind carries."""
        sides = _sides(array.dims)
        if array.size <= _FEW and kind != "collective-permute":
            return SCALARS
        if kind == "collective-permute" and sides in self.rows:
            return MIXUP_ROWS
        if self.in_slices and array.dims[-2:] == _TILE:
            return GRADIENTS
        known = sides in self.parameters or (
            len(sides) <= 1 and array.size in self.sizes and kind in SUMS
        )
        if not known:
            return ACTIVATIONS
        return GRADIENTS if kind in SUMS else PARAMETERS


def tensor_roles(
    shapes: Mapping[str, tuple[int, ...]],
    fsdp: int,
    rows: Iterable[tuple[int, ...]],
    *,
    in_slices: bool = False,
) -> TensorRoles:
    """Returns what collectives of a model may carry.

    Args:
        shapes: of its parameters, by path.
        fsdp: devices that each is split over.
        rows: shapes of one row of a batch: of its images, labels and targets.
        in_slices: whether there are several slices.
    """
    whole: set[tuple[int, ...]] = set()
    for path, shape in shapes.items():
        whole |= {_sides(shape)}
        if path.startswith("blocks/"):
            whole |= {_sides(shape[1:])}
            # An unrolled scan sees its blocks in equal groups.
            groups = [n for n in range(2, shape[0]) if not shape[0] % n]
            whole |= {_sides((n, shape[0] // n, *shape[1:])) for n in groups}
            whole |= {_sides((n, *shape[1:])) for n in groups}
        if len(shape) > 2:
            whole |= {_sides((math.prod(shape[:-1]), shape[-1]))}
    parts = {
        _sides((*sides[:place], side // fsdp, *sides[place + 1 :]))
        for sides in whole
        for place, side in enumerate(sides)
        if side % fsdp == 0
    }
    known = whole | parts
    total = sum(math.prod(shape) for shape in shapes.values())
    sizes = {math.prod(sides) for sides in known} | {total, -(-total // fsdp)}
    # One row may travel as a vector, or as an array with further sides of one.
    rows = list(rows)
    flat = {(math.prod(row),) for row in rows}
    row_sides = frozenset({*map(_sides, rows), *flat})
    return TensorRoles(frozenset(known), frozenset(sizes), row_sides, in_slices)


def _sides(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(side for side in shape if side != 1))
