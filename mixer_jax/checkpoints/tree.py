"""Parameter trees on the host: nested dictionaries of arrays, as in Flax."""

from collections.abc import Iterator
from typing import Any

import numpy as np

Tree = dict[str, Any]

_ALIGNMENT = 64  # Bytes. On the CPU, XLA copies arrays that are not aligned to this.


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each leaf with its slash-separated path, such as "stem/kernel"."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def unflatten(flat: dict[str, Any]) -> Tree:
    """Builds a tree from leaves by slash-separated path."""
    tree: Tree = {}
    for path, value in flat.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Allocates an uninitialized float32 array that JAX on the CPU can use without a copy."""
    size = 4 * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)
