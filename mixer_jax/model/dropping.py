"""What training drops at random: the same on any number of devices."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Int, Key


def draw_mask(
    rng: Key[Array, ""], place: Int[Array, ""], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Draws a mask from nothing but the key and the place in its batch of what it is for.

    So masks are the same on any number of devices and in any number of pieces of the batch.

    Args:
        rng: common to the batch.
        place: of an image, or of a vector among those of all images.
        probability: that an element is true.
        shape: of the mask.
    """
    return jax.random.bernoulli(jax.random.fold_in(rng, place), probability, shape)


def draw_masks(
    rng: Key[Array, ""], places: Int[Array, " n"], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "n ..."]:
    """Draws a mask for each of several places, as `draw_mask`."""
    return jax.vmap(lambda place: draw_mask(rng, place, probability, shape))(places)
