"""Image sizes: as a caller gives them, as weights tell them, and those too large for a machine."""

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from mixer_jax.checkpoints.formats.npz import METADATA_SUFFIX
from mixer_jax.checkpoints.hub import CONFIG_FILE
from mixer_jax.checkpoints.layouts import TIMM, LoadedWeights
from mixer_jax.checkpoints.model_info import ModelInfo, format_image_size
from mixer_jax.errors import UserError
from mixer_jax.model.variants import parameter_shapes

ImageSize = SupportsIndex | Sequence[SupportsIndex]
# Weights may be resized to at most so many bytes, where the machine's memory is not known.
_MOST_BYTES = 64 * 2**30


def parse_image_size(name: str, size: Any) -> tuple[int, int] | None:
    """Returns an argument that is a size as height and width."""
    if size is None:
        return None
    try:
        given = size if isinstance(size, list | tuple) else (size, size)
        sides = [operator.index(side) for side in given]
    except TypeError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"{name}={size!r} is no size; pass a side or (height, width), whole pixels")
    return sides[0], sides[1]


def check_fits_in_ram(about: ModelInfo) -> None:
    """Raises UserError if weights are larger than the machine's memory."""
    rows, columns = about.grid
    shapes = parameter_shapes(about.widths, rows * columns, about.num_classes)
    needed = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(np.float32).itemsize
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        most = _MOST_BYTES
    if needed > most:
        raise UserError(
            f"{about.name} would take {needed // 10**9:,} GB for its weights alone, and this "
            f"machine has {most // 10**9:,} GB; pass a smaller image_size"
        )


def matches_num_tokens(size: tuple[int, int], read: LoadedWeights) -> bool:
    """Returns whether an image of this height and width has as many tokens as weights are for."""
    patch = read.widths.patch_size
    tokens = math.prod(side // patch for side in size)
    return not any(side % patch for side in size) and tokens == read.num_tokens


def infer_image_size(
    read: LoadedWeights, said: tuple[int, int] | None, wanted: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Returns the image size that published weights are for.

    Args:
        read: the weights.
        said: by their file or the caller.
        wanted: by the caller.
        source: of the weights, for messages.

    Raises:
        UserError: it cannot be told, or what is said does not fit the tokens.
    """
    patch = read.widths.patch_size
    have = f"{read.num_tokens} tokens of {patch} px"
    if said is not None:
        if not matches_num_tokens(said, read):
            raise UserError(f"{source} says image_size={list(said)}, but has {have}")
        return said
    side = math.isqrt(read.num_tokens)
    square = (side * patch, side * patch) if side**2 == read.num_tokens else None
    fitting = wanted if wanted is not None and matches_num_tokens(wanted, read) else None
    if square and fitting not in (None, square):
        beside = f"{Path(source).name}{METADATA_SUFFIX}", '{"image_size": [height, width]}'
        if read.layout is TIMM:
            beside = CONFIG_FILE, '{"input_size": [3, height, width]}'
        raise UserError(
            f"{source} has {have}, which may be {format_image_size(square)} or "
            f"{format_image_size(fitting)} alike; "
            "pass pretrain_image_size=(height, width) in Python, or write "
            f"{beside[1]} into {beside[0]} beside it"
        )
    size = square or fitting
    if size is None:
        raise UserError(
            f"{source} has {have}, which make no square image; pass image_size=(height, width) or "
            "pretrain_image_size=(height, width) that the weights were trained at"
        )
    return size
