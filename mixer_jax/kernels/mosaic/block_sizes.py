"""Block sizes of the TPU kernels, so that each program fits into VMEM. Does not import JAX.

The VMEM that a program needs was measured by compiling: parameters and sums, in whole tiles; blocks
of images twice, because one is fetched while another is processed; and register spills.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class BlockSize(NamedTuple):
    """Work of one program of a kernel.

    Attributes:
        images: Maximum number of images; the largest divisor of the batch is used.
        hidden: Hidden units of channel mixing at a time; token mixing computes all at once.
    """

    images: int
    hidden: int


class BranchSizes(NamedTuple):
    """Block sizes of a branch's two kernels.

    Attributes:
        cores: Cores per device, over which the images are divided.
        vmem: Bytes of VMEM that a program may use.
    """

    forward: BlockSize
    backward: BlockSize
    cores: int
    vmem: int


class BlockSizes(NamedTuple):
    """Block sizes of the kernels of a Mixer block's two branches."""

    token_mixing: BranchSizes
    channel_mixing: BranchSizes


class _BranchShape(NamedTuple):
    tokens: int
    channels: int
    hidden: int
    itemsize: int


class _Device(NamedTuple):
    cores: int
    vmem: int


_MIB = 2**20
# Cores per device, and VMEM per core: less than the compiler admits, which is 128 and 64 MiB. The
# 16 MiB of v4 and older cannot hold the gradients of a Mixer-B.
_V5E, _V5P, _7X = _Device(1, 100 * _MIB), _Device(2, 60 * _MIB), _Device(1, 60 * _MIB)
# By `Device.device_kind`.
_DEVICES = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V5E,
    "TPU v6e": _V5E,
    "TPU7x": _7X,
}
# Rows of channel mixing's matmuls, and hidden units at a time. By the compiler's schedules for a
# v6e, 1,664 rows take 7 % less time per row than 832, which take 6 % less than 416; 512 hidden
# units backward take 2 % less than 256. But the program grows with both, and so does its
# compilation time.
_MAX_ROWS, _MAX_FORWARD_HIDDEN, _MAX_BACKWARD_HIDDEN = 1024, 1024, 256
# Images of token mixing, which do not share a matmul: 15 % less time for 4 than for 1 forward, 5 %
# backward.
_MAX_FORWARD_IMAGES, _MAX_BACKWARD_IMAGES = 4, 2
# Lanes per register: slices of a last axis must be multiples of this.
_LANES = 128
# Reserve for the compiler.
_RESERVED = 2 * _MIB


def choose_block_sizes(
    tokens: int,
    channels: int,
    tokens_mlp_dim: int,
    channels_mlp_dim: int,
    device_kind: str,
    itemsize: int = 2,
) -> BlockSizes | None:
    """Chooses block sizes with which a block's kernels fit into VMEM, or None if none do.

    Args:
        tokens: Tokens per image.
        channels: Channels per token.
        tokens_mlp_dim: Hidden units of token mixing.
        channels_mlp_dim: Hidden units of channel mixing.
        device_kind: Device as JAX names it, e.g. "TPU v6 lite".
        itemsize: Bytes per number of the computation.
    """
    device = _DEVICES.get(device_kind)
    if device is None:
        return None
    images = max(1, _MAX_ROWS // padded_rows(tokens, itemsize))
    token_mixing = _choose_branch_sizes(
        _token_vmem,
        _BranchShape(tokens, channels, tokens_mlp_dim, itemsize),
        device,
        BlockSize(min(images, _MAX_FORWARD_IMAGES), tokens_mlp_dim),
        BlockSize(min(images, _MAX_BACKWARD_IMAGES), tokens_mlp_dim),
    )
    channel_mixing = _choose_branch_sizes(
        _channel_vmem,
        _BranchShape(tokens, channels, channels_mlp_dim, itemsize),
        device,
        BlockSize(images, _MAX_FORWARD_HIDDEN),
        BlockSize(images, _MAX_BACKWARD_HIDDEN),
    )
    if token_mixing is None or channel_mixing is None:
        return None
    return BlockSizes(token_mixing, channel_mixing)


def _choose_branch_sizes(
    vmem: Callable[[_BranchShape, BlockSize, bool], int],
    shape: _BranchShape,
    device: _Device,
    max_forward: BlockSize,
    max_backward: BlockSize,
) -> BranchSizes | None:
    forward = _first_that_fits(vmem, shape, False, device, max_forward)
    backward = _first_that_fits(vmem, shape, True, device, max_backward)
    if forward is None or backward is None:
        return None
    return BranchSizes(forward, backward, device.cores, device.vmem)


def _token_vmem(shape: _BranchShape, size: BlockSize, backward: bool) -> int:
    """Returns the bytes of VMEM that a kernel of token mixing needs."""
    tokens, channels, hidden, itemsize = shape
    kernel = max(_tiled_bytes(tokens, hidden, itemsize), _tiled_bytes(hidden, tokens, itemsize))
    biases = (
        _tiled_bytes(hidden, 1, 4) + _tiled_bytes(tokens, 1, 4) + 2 * _tiled_bytes(1, channels, 4)
    )
    params = (3 if backward else 2) * kernel + biases
    sums = 2 * _tiled_bytes(tokens, hidden, 4) + biases if backward else 0
    # Hidden units before and after GELU, their cotangents and so on.
    spills = (6 if backward else 3) * size.images * _tiled_bytes(hidden, channels, 4)
    return params + sums + _image_bytes(shape, size, backward) + spills + _RESERVED


def _channel_vmem(shape: _BranchShape, size: BlockSize, backward: bool) -> int:
    """Returns the bytes of VMEM that a kernel of channel mixing needs."""
    tokens, channels, hidden, itemsize = shape
    rows = size.images * padded_rows(tokens, itemsize)
    kernel = max(_tiled_bytes(channels, hidden, itemsize), _tiled_bytes(hidden, channels, itemsize))
    biases = _tiled_bytes(1, hidden, 4) + 3 * _tiled_bytes(1, channels, 4)
    matrix = _tiled_bytes(rows, channels, itemsize)
    transposed = _tiled_bytes(channels, rows, itemsize)
    scratch = _tiled_bytes(rows, channels, 4) + (2 * (matrix + transposed) if backward else matrix)
    sums = 2 * _tiled_bytes(channels, hidden, 4) + biases if backward else 0
    # Hidden units, as for token mixing, and an image during LayerNorm.
    spills = (6 if backward else 2) * _tiled_bytes(rows, size.hidden, 4)
    spills += _tiled_bytes(tokens, channels, 4)
    params = 2 * kernel + biases
    return params + sums + scratch + _image_bytes(shape, size, backward) + spills + _RESERVED


def padded_rows(tokens: int, itemsize: int) -> int:
    """Returns the rows of the tiles that hold all tokens of one image."""
    tile = 32 // itemsize
    return math.ceil(tokens / tile) * tile


def _first_that_fits(
    vmem: Callable[[_BranchShape, BlockSize, bool], int],
    shape: _BranchShape,
    backward: bool,
    device: _Device,
    limit: BlockSize,
) -> BlockSize | None:
    """Returns the largest block size up to `limit` that fits, with as many images as possible."""
    whole_registers = range(limit.hidden // _LANES * _LANES, 0, -_LANES)
    divisors = [hidden for hidden in whole_registers if shape.hidden % hidden == 0]
    for images in range(limit.images, 0, -1):
        for hidden in divisors or [shape.hidden]:
            size = BlockSize(images, hidden)
            if vmem(shape, size, backward) <= device.vmem:
                return size
    return None


def _image_bytes(shape: _BranchShape, size: BlockSize, backward: bool) -> int:
    """Returns the bytes of a program's images, double-buffered."""
    block = size.images * _tiled_bytes(shape.tokens, shape.channels, shape.itemsize)
    return (6 if backward else 4) * block


def _tiled_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Returns the bytes of a matrix in whole tiles."""
    return padded_rows(rows, itemsize) * math.ceil(columns / _LANES) * _LANES * itemsize
