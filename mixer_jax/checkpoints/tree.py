"""Trees of parameters on the host: nested dictionaries of arrays, as Flax has them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Tree = dict[str, Any]

# Bytes; XLA on the CPU copies an array whose address is no multiple of this.
_ALIGNMENT = 64


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every leaf by its path, e.g. "stem/kernel"."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def unflatten(flat: dict[str, Any]) -> Tree:
    """Returns the tree whose `flatten` are these."""
    tree: Tree = {}
    for path, value in flat.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def empty_aligned(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns float32 arrays of these shapes, not yet filled, where JAX need not copy them."""
    return {path: _empty(shape) for path, shape in shapes.items()}


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)
