"""Tests of Vision Transformers: sizes, mathematics, and the effect of each setting."""

import dataclasses

import pytest

from mixer_jax.models.registry import get_family
from mixer_jax.models.vit_config import VARIANTS

FAMILY = get_family("vit")

# BASELINES: A.3; without head, 1,000 classes, 21,843 classes, the same with pre_logits, GFLOP with
# 1,000 classes, at 224 px.
SIZES = {
    "Ti/16": (5_524_416, 5_717_416, 9_740_115, 9_777_171, 2.51),
    "S/32": (22_493_952, 22_878_952, 30_903_507, 31_051_347, 2.29),
    "S/16": (21_665_664, 22_050_664, 30_075_219, 30_223_059, 9.20),
    "B/32": (87_455_232, 88_224_232, 104_252_499, 104_843_091, 8.82),
    "B/16": (85_798_656, 86_567_656, 102_595_923, 103_186_515, 35.13),
    "B/8": (85_807_872, 86_576_872, 102_605_139, 103_195_731, 156.30),
    "L/32": (305_510_400, 306_535_400, 327_899_475, 328_949_075, 30.76),
    "L/16": (303_301_632, 304_326_632, 325_690_707, 326_740_307, 123.11),
    "H/14": (630_764_800, 632_045_800, 658_745_683, 660_385_363, 334.59),
    "g/14": (1_011_202_432, 1_012_611_432, 1_041_979_219, 0, 534.06),
    "G/14": (1_842_775_680, 1_844_440_680, 1_879_144_275, 0, 967.50),
}
# The same with 1,000 classes at other image sizes.
OTHER_SIZES = {
    ("B/32", 384): (88_297_192, 26.1),
    ("B/16", 384): (86_859_496, 111.0),
    ("B/16", 448): (87_019_240, 157.0),
    ("L/32", 384): (306_632_680, 90.6),
    ("L/16", 384): (304_715_752, 382.1),
    ("L/16", 448): (304_928_744, 535.9),
    ("L/16", 512): (305_174_504, 724.0),
    ("H/14", 448): (633_028_840, 1463.4),
    ("H/14", 518): (633_470_440, 2033.4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_num_params_and_flops(variant: str) -> None:
    config, (*counts, with_pre_logits, gflop) = VARIANTS[variant], SIZES[variant]
    assert [FAMILY.num_params(config, 224, n) for n in (0, 1000, 21_843)] == counts
    if with_pre_logits:
        hidden = dataclasses.replace(config, pre_logits=True)
        assert FAMILY.num_params(hidden, 224, 21_843) == with_pre_logits
    assert round(FAMILY.forward_flops(config, 224, 1000) / 1e9, 2) == gflop


@pytest.mark.parametrize(("variant", "image_size"), OTHER_SIZES)
def test_num_params_and_flops_at_other_image_sizes(variant: str, image_size: int) -> None:
    num_params, gflop = OTHER_SIZES[variant, image_size]
    config = VARIANTS[variant]
    assert FAMILY.num_params(config, image_size, 1000) == num_params
    assert round(FAMILY.forward_flops(config, image_size, 1000) / 1e9, 1) == gflop


@pytest.mark.parametrize(("variant", "expected"), [("B/16", 86_566_120), ("S/16", 22_049_896)])
def test_num_params_of_gap(variant: str, expected: int) -> None:
    config = dataclasses.replace(VARIANTS[variant], pooling="gap")
    assert FAMILY.num_params(config, 224, 1000) == expected
