"""How the kernels of tpu_kernels.py divide their work, so that it fits on a TPU's chip.

What a program needs of the on-chip memory (VMEM) was measured by compiling: parameters and sums,
in whole tiles; blocks of images twice, for one is computed while another is fetched; and what
finds no room in registers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Cut(NamedTuple):
    """What a program of a kernel computes.

    Attributes:
        images: at the most; the greatest divisor of the batch is taken.
        units: hidden units of channel mixing at a time; token mixing computes all at once.
    """

    images: int
    units: int


class Sizes(NamedTuple):
    """Of the two kernels of a branch.

    Attributes:
        forward: of the forward kernel.
        backward: of the backward kernel.
        cores: of a device, among which the images are divided.
        vmem: bytes of on-chip memory that a program may use.
    """

    forward: Cut
    backward: Cut
    cores: int
    vmem: int


class BlockSizes(NamedTuple):
    """Of the kernels of a block's two branches."""

    token_mixing: Sizes
    channel_mixing: Sizes


class _Widths(NamedTuple):
    tokens: int
    channels: int
    hidden: int
    itemsize: int


class _Chip(NamedTuple):
    cores: int
    vmem: int


_MIB = 2**20
# Cores of a device, and on-chip memory of a core: less than the compiler admits, which is 128 and
# 64 MiB. The 16 of v4 and older do not hold the gradients of a Mixer-B.
_V5E, _V5P, _7X = _Chip(1, 100 * _MIB), _Chip(2, 60 * _MIB), _Chip(1, 60 * _MIB)
# By `Device.device_kind`.
_CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V5E,
    "TPU v6e": _V5E,
    "TPU7x": _7X,
}
# Rows of channel mixing's products, and hidden units at a time. By the compiler's schedules for a
# v6e, 1,664 rows take 7 % less time a row than 832, which take 6 % less than 416; 512 units
# backward take 2 % less than 256. But the program grows with both, and so does compiling it.
_ROWS, _FORWARD_UNITS, _BACKWARD_UNITS = 1024, 1024, 256
# Images of token mixing, which do not share a product: 15 % less time for 4 than for 1 forward, 5 %
# backward.
_FORWARD_IMAGES, _BACKWARD_IMAGES = 4, 2
# Lanes of a register: what slices of a last axis are multiples of.
_LANES = 128
# For what the compiler needs beside.
_SPARE = 2 * _MIB


def choose_sizes(
    tokens: int,
    channels: int,
    tokens_mlp_dim: int,
    channels_mlp_dim: int,
    device_kind: str,
    itemsize: int = 2,
) -> BlockSizes | None:
    """Returns sizes with which the kernels of a block fit on the chip, or None where they do not.

    Args:
        tokens: of an image.
        channels: of a token.
        tokens_mlp_dim: hidden units of token mixing.
        channels_mlp_dim: hidden units of channel mixing.
        device_kind: as JAX names it, e.g. "TPU v6 lite".
        itemsize: bytes of a number of the computation.
    """
    chip = _CHIPS.get(device_kind)
    if chip is None:
        return None
    by_tokens = _Widths(tokens, channels, tokens_mlp_dim, itemsize)
    by_channels = _Widths(tokens, channels, channels_mlp_dim, itemsize)
    images = max(1, _ROWS // padded_rows(tokens, itemsize))
    forward, backward = min(images, _FORWARD_IMAGES), min(images, _BACKWARD_IMAGES)
    cuts = [
        _first_that_fits(_token_vmem, by_tokens, False, chip, Cut(forward, tokens_mlp_dim)),
        _first_that_fits(_token_vmem, by_tokens, True, chip, Cut(backward, tokens_mlp_dim)),
        _first_that_fits(_channel_vmem, by_channels, False, chip, Cut(images, _FORWARD_UNITS)),
        _first_that_fits(_channel_vmem, by_channels, True, chip, Cut(images, _BACKWARD_UNITS)),
    ]
    found = [cut for cut in cuts if cut is not None]
    if len(found) < len(cuts):
        return None
    return BlockSizes(
        Sizes(found[0], found[1], chip.cores, chip.vmem),
        Sizes(found[2], found[3], chip.cores, chip.vmem),
    )


def _token_vmem(widths: _Widths, cut: Cut, backward: bool) -> int:
    """Returns the bytes of on-chip memory that a kernel of token mixing needs.

    Args:
        widths: of the branch.
        cut: of a program.
        backward: whether it is the backward kernel.
    """
    tokens, channels, hidden, itemsize = widths
    kernel = max(_tiles(tokens, hidden, itemsize), _tiles(hidden, tokens, itemsize))
    biases = _tiles(hidden, 1, 4) + _tiles(tokens, 1, 4) + 2 * _tiles(1, channels, 4)
    held = (3 if backward else 2) * kernel + biases
    summed = 2 * _tiles(tokens, hidden, 4) + biases if backward else 0
    # Hidden units as they are before GELU, after it, their cotangents and so on.
    spilled = (6 if backward else 3) * cut.images * _tiles(hidden, channels, 4)
    return held + summed + _blocks(widths, cut, backward) + spilled + _SPARE


def _channel_vmem(widths: _Widths, cut: Cut, backward: bool) -> int:
    """Returns the bytes of on-chip memory that a kernel of channel mixing needs.

    Args:
        widths: of the branch.
        cut: of a program.
        backward: whether it is the backward kernel.
    """
    tokens, channels, hidden, itemsize = widths
    rows = cut.images * padded_rows(tokens, itemsize)
    kernel = max(_tiles(channels, hidden, itemsize), _tiles(hidden, channels, itemsize))
    biases = _tiles(1, hidden, 4) + 3 * _tiles(1, channels, 4)
    lying, across = _tiles(rows, channels, itemsize), _tiles(channels, rows, itemsize)
    scratch = _tiles(rows, channels, 4) + (2 * (lying + across) if backward else lying)
    summed = 2 * _tiles(channels, hidden, 4) + biases if backward else 0
    # Hidden units, as for token mixing, and an image on its way through LayerNorm.
    spilled = (6 if backward else 2) * _tiles(rows, cut.units, 4) + _tiles(tokens, channels, 4)
    held = 2 * kernel + biases
    return held + summed + scratch + _blocks(widths, cut, backward) + spilled + _SPARE


def padded_rows(tokens: int, itemsize: int) -> int:
    """Returns the rows of the whole tiles that an image's tokens take."""
    tile = 32 // itemsize
    return math.ceil(tokens / tile) * tile


def _first_that_fits(
    vmem: Callable[[_Widths, Cut, bool], int],
    widths: _Widths,
    backward: bool,
    chip: _Chip,
    most: Cut,
) -> Cut | None:
    """Returns the largest cut up to `most` that fits, images before units, if there is one."""
    whole_registers = range(most.units // _LANES * _LANES, 0, -_LANES)
    divisors = [units for units in whole_registers if widths.hidden % units == 0]
    for images in range(most.images, 0, -1):
        for units in divisors or [widths.hidden]:
            cut = Cut(images, units)
            if vmem(widths, cut, backward) <= chip.vmem:
                return cut
    return None


def _blocks(widths: _Widths, cut: Cut, backward: bool) -> int:
    """Returns the bytes of images, and of as many that are fetched or written meanwhile."""
    block = cut.images * _tiles(widths.tokens, widths.channels, widths.itemsize)
    return (6 if backward else 4) * block


def _tiles(rows: int, columns: int, itemsize: int) -> int:
    """Returns the bytes of a matrix in whole tiles."""
    return padded_rows(rows, itemsize) * math.ceil(columns / _LANES) * _LANES * itemsize
