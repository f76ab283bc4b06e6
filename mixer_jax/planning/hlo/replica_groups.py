"""Which devices take part in a collective of a compiled program, in all notations of XLA."""

import itertools
import math
import re
from collections.abc import Sequence

# Numbers of devices, as the program counts them: row by row over the mesh.
Groups = tuple[tuple[int, ...], ...]

_BRACES = r"\{((?:\s*\{[\d,\s]*\}\s*,?)*)\}"
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LIST = re.compile(r"replica_groups=" + _BRACES)
_PAIRS = re.compile(r"source_target_pairs=" + _BRACES)
_MESH = re.compile(
    r"replica_groups=(?:mesh)?\[([^\]]*)\](?:,\s*device_ids=\(([^)]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}"
)
_AXIS = re.compile(r"'?([\w]+)'?\s*=\s*(\d+)")
_USED = re.compile(r"'?([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?")


def read_groups(attributes: str, num_devices: int) -> Groups:
    """Returns the groups of devices that a collective joins.

    Args:
        attributes: of the instruction.
        num_devices: of the program; all of them make one group where none is given.
    """
    if found := _LIST.search(attributes):
        groups = _inner(found.group(1))
        return groups or (tuple(range(num_devices)),)
    if found := _IOTA.search(attributes):
        order = _permuted(found.group(2), found.group(3))
        size = _numbers(found.group(1))[-1]
        return tuple(tuple(order[at : at + size]) for at in range(0, len(order), size))
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    return (tuple(range(num_devices)),)


def read_pairs(attributes: str) -> Groups:
    """Returns the pairs (from, to) of a collective-permute."""
    found = _PAIRS.search(attributes)
    return _inner(found.group(1)) if found else ()


def mesh_axis_of(groups: Groups, mesh: dict[str, int], *, pairs: bool = False) -> str:
    """Returns the axis of a mesh that groups lie along: its name, "all", or "other".

    Args:
        groups: of devices, or pairs of them.
        mesh: sizes of its axes by name, the last varying fastest.
        pairs: whether they are pairs; those of one ring over the mesh go along "all".
    """
    sizes = list(mesh.values())
    moved = {
        axis
        for group in groups
        for places in [[_place(device, sizes) for device in group]]
        for axis, name in enumerate(mesh)
        if len({place[axis] for place in places}) > 1
    }
    names = list(mesh)
    if not moved:
        return "none"
    along = math.prod(sizes[axis] for axis in moved)
    if not pairs and any(len(group) != along for group in groups):
        return "other"
    if len(moved) == 1:
        return names[moved.pop()]
    return "all"


def _place(device: int, sizes: Sequence[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        device, at = divmod(device, size)
        place.append(at)
    return tuple(reversed(place))


def _mesh_groups(axes: str, device_ids: str | None, used: str) -> Groups:
    """Returns the groups along the named axes, or parts of axes `name:(before)size`, of a mesh."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    # Every axis is cut into (size before the part, the part, the rest), to treat all alike.
    cuts: dict[str, list[int]] = {name: [1, size, 1] for name, size in sizes.items()}
    chosen = []
    for name, before, part in _USED.findall(used):
        if before:
            cuts[name] = [int(before), int(part), sizes[name] // int(before) // int(part)]
        chosen.append(name)
    shape = [size for name in sizes for size in cuts[name]]
    along = [3 * list(sizes).index(name) + 1 for name in chosen]
    others = [axis for axis in range(len(shape)) if axis not in along]
    order = _device_order(device_ids, math.prod(shape))

    def flat(place: dict[int, int]) -> int:
        number = 0
        for axis, size in enumerate(shape):
            number = number * size + place.get(axis, 0)
        return order[number]

    def places(axes: list[int]) -> list[dict[int, int]]:
        ranges = [range(shape[axis]) for axis in axes]
        return [dict(zip(axes, at, strict=True)) for at in itertools.product(*ranges)]

    return tuple(
        tuple(flat(fixed | moving) for moving in places(along)) for fixed in places(others)
    )


def _device_order(device_ids: str | None, count: int) -> list[int]:
    """Returns the devices of a mesh row by row: `[8]`, `[4,2]T(1,0)`, a list, or nothing."""
    if not device_ids:
        return list(range(count))
    if found := re.search(r"\[([\d,]+)\]T\(([\d,]+)", device_ids):
        return _permuted(*found.groups())
    listed = _numbers(device_ids.strip("[]"))
    return list(listed) if len(listed) == count else list(range(count))


def _permuted(shape: str, permutation: str | None) -> list[int]:
    """Returns 0, 1, 2 … laid out in a shape, its axes permuted, read row by row."""
    sizes = _numbers(shape)
    axes = _numbers(permutation) if permutation else tuple(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ranges = [range(sizes[axis]) for axis in axes]
    return [
        sum(step * strides[axis] for step, axis in zip(at, axes, strict=True))
        for at in itertools.product(*ranges)
    ]


def _inner(text: str) -> Groups:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
