"""Layer-wise learning rates compared with timm's."""

import importlib
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.models.param_groups import learning_rate_factors
from mixer_jax.models.registry import get_family

pytestmark = pytest.mark.baselines

DECAY = 0.65
MODELS = [
    ("mixer", "S/32", "mixer_s32_224", {}),
    ("vit", "Ti/16", "vit_tiny_patch16_224", {}),
    ("vit", "S/16", "vit_small_patch16_224", {"pooling": "gap"}),
    ("vit", "S/16", "vit_small_patch16_224", {"pooling": "map"}),
    ("bit", "R50x1", "resnetv2_50x1_bit", {}),
]
POOLING = {"gap": {"global_pool": "avg", "class_token": False, "fc_norm": False}}
POOLING |= {"map": {"global_pool": "map", "class_token": False, "fc_norm": False}}


@pytest.mark.parametrize(("name", "variant", "timm_name", "overrides"), MODELS)
def test_factors_of_all_parameters_equal_timms(
    timm: Any, name: str, variant: str, timm_name: str, overrides: dict[str, Any]
) -> None:
    settings = POOLING.get(overrides.get("pooling", ""), {})
    model = timm.create_model(timm_name, num_classes=10, **settings)
    grouping = importlib.import_module("timm.optim._param_groups")
    groups = grouping.param_groups_layer_decay(model, layer_decay=DECAY)
    scales = {id(tensor): group["lr_scale"] for group in groups for tensor in group["params"]}
    expected = {key: scales[id(tensor)] for key, tensor in model.named_parameters()}

    family = get_family(name)
    config = family.get_config(variant, **overrides)
    params = {}
    for path, shape in family.param_shapes(config, 224, 10).items():
        factors = learning_rate_factors(DECAY, family, config, tuple(path.split("/")))
        column = np.reshape(factors, (-1, *(1,) * (len(shape) - 1)))
        params[path] = np.broadcast_to(column, shape)
    (layout,) = (layout for layout in family.weight_layouts() if layout.name == "timm")
    actual = {}
    for key, tensor in layout_tensors(params, layout):
        assert np.ptp(tensor) == 0
        actual[key] = tensor.flat[0]
    assert actual.keys() == expected.keys()
    for key, factor in expected.items():
        assert actual[key] == pytest.approx(factor, rel=1e-12), key
