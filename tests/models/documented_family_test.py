"""Tests of the family that docs/add_model_family.md adds; its commands are run by docs_test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints.formats import write_npz
from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.models.family import ModelFamily
from mixer_jax.models.registry import create_model, list_model_names
from mixer_jax.models.stack import forward_intermediates
from tests.helpers.families import check_family, documented_family
from tests.helpers.models import random_images, random_params
from tests.helpers.random_weights import assert_params_equal


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFamily]:
    with documented_family(tmp_path_factory.mktemp("gmlp")) as family:
        yield family


def tiny(**overrides: Any) -> Any:
    sizes = {"num_blocks": 3, "patch_size": 4, "hidden_dim": 8, "mlp_dim": 12}
    return create_model("gMLP-custom", 5, **sizes, **overrides)


def test_it_keeps_the_promises_of_a_family(family: ModelFamily) -> None:
    check_family(family)
    assert "gMLP-S/16" in list_model_names()


def test_its_sizes_are_the_papers(family: ModelFamily) -> None:
    counts = {name: family.num_params(c, 224, 1000) for name, c in family.variants.items()}
    # Table 1 of the paper: 5.9, 19.5 and 73 million, 2.7, 8.9 and 31.6 GFLOP.
    assert counts == {"Ti/16": 5_867_328, "S/16": 19_422_656, "B/16": 73_075_392}
    flops = [family.forward_flops(c, 224, 1000) for c in family.variants.values()]
    np.testing.assert_allclose(flops, [2.7e9, 8.9e9, 31.6e9], rtol=0.02)


def test_scan_and_remat_do_not_change_values(family: ModelFamily) -> None:
    images, params = random_images(2, 8), random_params(tiny(), 8)

    def value_and_grad(model: Any) -> Any:
        rngs = {"stochastic_depth": jax.random.key(0)}

        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, images, train=True, rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))

    expected = value_and_grad(tiny(stochastic_depth=0.5))
    actual = value_and_grad(tiny(stochastic_depth=0.5, scan_unroll=1, remat="dots"))
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    _, activations = forward_intermediates(tiny(), params, images)
    assert activations["blocks.2.gated"].shape == (2, 4, 8)


def test_timms_layout_is_not_taken_for_that_of_mixer(family: ModelFamily, tmp_path: Path) -> None:
    """The stem, whose name is the same in both, comes first in timm's files."""
    params = jax.tree.map(np.asarray, random_params(tiny(), 8, 12))
    (layout,) = family.weight_layouts()
    views = [*layout_tensors(dict(flatten_params(params)), layout)]
    assert views[0][0] == "stem.proj.weight"
    write_npz(str(tmp_path / "gmlp.npz"), views, {})
    loaded = load_checkpoint(tmp_path / "gmlp.npz", pretrain_image_size=(8, 12))
    assert (loaded.model_info.family, loaded.model_info.config) == ("gmlp", tiny().config)
    assert_params_equal(loaded.params, params)


def test_constant_gates_stay_constant_at_another_size(family: ModelFamily) -> None:
    gate = {"kernel": np.full((3, 6, 6), 0.5, np.float32), "bias": np.ones((3, 6), np.float32)}
    params = {"blocks": {"gate": gate}}
    resized = family.resize_params(params, tiny().config, (8, 12), (16, 12))["blocks"]["gate"]
    # Twice the input tokens, each with half the weight.
    np.testing.assert_allclose(resized["kernel"], np.full((3, 12, 12), 0.25), rtol=1e-6)
    np.testing.assert_allclose(resized["bias"], np.ones((3, 12)), rtol=1e-6)
