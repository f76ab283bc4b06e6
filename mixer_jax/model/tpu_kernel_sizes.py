"""Dummy."""
from typing import NamedTuple


class Sizes(NamedTuple):
    forward_images: int
    backward_images: int
    forward_chunk: int
    backward_chunk: int
    cores: int
    vmem: int


def padded_rows(tokens: int, itemsize: int) -> int:
    tile = 32 // itemsize
    return -(-tokens // tile) * tile
