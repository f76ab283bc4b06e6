"""Dummy."""
from typing import NamedTuple


class Cut(NamedTuple):
    images: int
    chunk: int


class Sizes(NamedTuple):
    forward: Cut
    backward: Cut
    cores: int
    vmem: int


def padded_rows(tokens: int, itemsize: int) -> int:
    tile = 32 // itemsize
    return -(-tokens // tile) * tile
