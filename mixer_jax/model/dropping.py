"""What training drops at random: the same on any number of devices."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Int, Key


def draw_masks(
    rng: Key[Array, ""], places: Int[Array, " n"], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "n ..."]:
    """Draws a mask for each image, from nothing but the key and the image's place in its batch.

    So masks are the same on any number of devices and in any number of pieces of the batch.

    Args:
        rng: common to the batch.
        places: of the images.
        probability: that an element is true.
        shape: of each image's mask.
    """

    def draw(place: Int[Array, ""]) -> Bool[Array, "..."]:
        return jax.random.bernoulli(jax.random.fold_in(rng, place), probability, shape)

    return jax.vmap(draw)(places)
