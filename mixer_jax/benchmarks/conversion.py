"""Parameters of ours as the reference has them."""

from typing import Any

import jax


def to_reference(params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters of a `MlpMixer` as those of a `ReferenceMixer`: blocks lie apart."""
    stacked = params["blocks"]
    num_blocks = len(jax.tree.leaves(stacked)[0])
    apart = {
        f"block_{number}": jax.tree.map(lambda x, number=number: x[number], stacked)
        for number in range(num_blocks)
    }
    return {name: value for name, value in params.items() if name != "blocks"} | apart
