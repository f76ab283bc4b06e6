"""Saliency: what the prediction for an image depends on, by occlusion and by gradient.

Both methods explain the log-odds of a class: the logarithm of its probability divided by that of
all other classes together. Unlike the probability, they do not saturate, and unlike the logit of a
softmax, they do not depend on a constant that is added to all logits.
"""

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mixer_jax.errors import UserError

METHODS = ("occlusion", "gradient")
Method = Literal["occlusion", "gradient"]
# Sides of the image per default side of the square.
_SQUARES_PER_SIDE = 7


class Saliency(NamedTuple):
    """Saliency of one image for one class.

    Attributes:
        image: Path of the image, or another name.
        pixels: Image as the model sees it, after crop and resizing.
        class_index: Class that is explained.
        name: Its name, or its index as text if names are unknown.
        probability: Its probability for the image.
        method: "occlusion" or "gradient".
        values: Saliency of each pixel; see `Classifier.saliency`.
    """

    image: str
    pixels: UInt8[np.ndarray, "height width 3"]
    class_index: int
    name: str
    probability: float
    method: Method
    values: Float[np.ndarray, "height width"]


def log_odds(
    logits: Float[Array, "n classes"],
    class_index: Int[Array, " n"] | Int[np.ndarray, " n"],
    loss: str,
) -> Float[Array, " n"]:
    """Computes the log-odds of one class per image: log p − log(1 − p).

    Args:
        logits: Outputs of the model.
        class_index: Class of each image.
        loss: Loss that the head was trained with, "sigmoid" or "softmax".
    """
    own = jnp.take_along_axis(logits, jnp.asarray(class_index)[:, None], axis=1)[:, 0]
    # The probability of a single class of a softmax is always 1.
    if loss == "sigmoid" or logits.shape[1] == 1:
        return own
    is_own = jnp.arange(logits.shape[1])[None] == jnp.asarray(class_index)[:, None]
    others = jnp.where(is_own, -jnp.inf, logits)
    return own - jax.nn.logsumexp(others, axis=1)


def resolve_square(
    square_size: int | None, stride: int | None, image_size: tuple[int, int]
) -> tuple[int, int]:
    """Returns side and stride of the square that occludes an image, in pixels.

    Args:
        square_size: Side; None: a seventh of the image's shorter side.
        stride: Step between two positions; None: half a side.
        image_size: Height and width of the image.

    Raises:
        UserError: The square is larger than the image, or the stride than the square.
    """
    shorter = min(image_size)
    size = max(shorter // _SQUARES_PER_SIDE, 1) if square_size is None else square_size
    if not 1 <= size <= shorter:
        raise UserError(
            f"square_size must be between 1 and {shorter}, the image's shorter side in pixels, got "
            f"{size}."
        )
    step = max(size // 2, 1) if stride is None else stride
    if not 1 <= step <= size:
        raise UserError(
            f"stride must be between 1 and the side of the square, {size} pixels, so that squares "
            f"cover the image, got {step}."
        )
    return size, step


def occlusion_saliency(
    compute_log_odds: Callable[[np.ndarray], np.ndarray],
    image: Float[np.ndarray, "height width 3"],
    *,
    square_size: int,
    stride: int,
    batch_size: int,
) -> Float[np.ndarray, "height width"]:
    """Computes how much the log-odds drop when a square with the image's mean color hides a pixel.

    The value of a pixel is the mean over all squares that cover it. Squares are inside the image;
    the last ones of a row or column may overlap more than the stride requires.

    Args:
        compute_log_odds: Function from images (batch_size, height, width, 3) to log-odds
            (batch_size,).
        image: Pixels in [-1, 1].
        square_size: Side of the square, in pixels.
        stride: Step between two positions, in pixels.
        batch_size: Images per call of the function.
    """
    rows, columns = (_positions(length, square_size, stride) for length in image.shape[:2])
    corners = list(itertools.product(rows, columns))
    color = image.mean((0, 1))
    # The first image is not occluded.
    scores: list[float] = []
    batch = np.empty((batch_size, *image.shape), image.dtype)
    for start in range(0, len(corners) + 1, batch_size):
        batch[:] = image
        for occluded, index in zip(batch, range(start - 1, len(corners)), strict=False):
            if index >= 0:
                top, left = corners[index]
                occluded[top : top + square_size, left : left + square_size] = color
        scores += compute_log_odds(batch).tolist()
    drops = scores[0] - np.array(scores[1 : len(corners) + 1])
    total, count = np.zeros((2, *image.shape[:2]))
    for (top, left), drop in zip(corners, drops, strict=True):
        square = np.s_[top : top + square_size, left : left + square_size]
        total[square] += drop
        count[square] += 1
    return (total / count).astype(np.float32)


def _positions(length: int, size: int, stride: int) -> list[int]:
    """Returns the first pixels of squares that cover an axis, the last one at its end."""
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] == length - size else [*starts, length - size]
