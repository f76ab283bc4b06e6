"""Tests of weights on the host."""

from typing import Any

import numpy as np

from mixer_jax.checkpoints.weights import params_digest
from tests.helpers.random_weights import random_weights


def test_params_digest_covers_paths_shapes_and_bytes() -> None:
    params = random_weights().params
    digest = params_digest(params)
    assert digest == params_digest(random_weights().params)
    assert digest != params_digest(random_weights(seed=1).params)
    # The order in the file is irrelevant.
    assert params_digest(dict(reversed(params.items()))) == digest
    array = np.arange(6, dtype=np.float32)
    trees: list[dict[str, Any]] = [
        {"a": array},
        {"b": array},
        {"a": array.reshape(2, 3)},
        {"a": {"a": array}},
    ]
    assert len({params_digest(tree) for tree in trees}) == 4
    # The strides of a view are irrelevant.
    assert params_digest({"a": np.repeat(array, 2)[::2]}) == params_digest({"a": array})
