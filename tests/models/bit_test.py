"""Tests of BiT-ResNet against the paper's sizes and an independent implementation."""

import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.bit_config import VARIANTS, BitConfig, num_groups
from mixer_jax.models.registry import get_family
from tests.helpers.messages import raises

FAMILY = get_family("bit")
# Parameters without head, with heads of 1,000 and of 21,843 classes; GFLOPs with 1,000 classes at
# 128, 224, 384, 448 and 480 px.
SIZES = {
    "R50x1": (23_500_352, 25_549_352, 68_256_659, (2.67, 8.18, 24.0, 32.7, 37.5)),
    "R50x2": (93_891_712, 97_988_712, 183_382_483, (10.53, 32.23, 94.7, 128.9, 148.0)),
    "R50x3": (211_174_080, 217_319_080, 345_399_315, (23.57, 72.16, 212.1, 288.6, 331.3)),
    "R101x1": (42_492_480, 44_541_480, 87_248_787, (5.10, 15.60, 45.8, 62.4, 71.6)),
    "R101x3": (381_789_888, 387_934_888, 516_015_123, (45.39, 138.98, 408.4, 555.9, 638.2)),
    "R152x1": (58_136_128, 60_185_128, 102_892_435, (7.52, 23.03, 67.7, 92.1, 105.7)),
    "R152x2": (232_238_208, 236_335_208, 321_728_979, (29.93, 91.63, 269.3, 366.5, 420.7)),
    "R152x4": (928_340_224, 936_533_224, 1_107_299_923, (119.38, 365.55, 1074.3, 1462.2, 1678.5)),
    "R200x3": (562_488_000, 568_633_000, 696_713_235, (87.75, 268.69, 789.6, 1074.7, 1233.8)),
}


def test_variants_have_the_papers_sizes() -> None:
    assert VARIANTS.keys() == SIZES.keys()
    for name, (*counts, gflops) in SIZES.items():
        config = FAMILY.get_config(name)
        assert [FAMILY.num_params(config, 224, n) for n in (0, 1000, 21843)] == counts
        for size, expected in zip((128, 224, 384, 448, 480), gflops, strict=True):
            flops = FAMILY.forward_flops(config, size, 1000) / 1e9
            # To the last digit given.
            assert abs(flops - expected) <= (0.0051 if expected in gflops[:2] else 0.051)


def test_published_widths_have_32_groups() -> None:
    for config in VARIANTS.values():
        assert num_groups(config.root_width) == num_groups(config.num_features) == 32
    assert [num_groups(n) for n in (2, 16, 20, 24, 32, 96)] == [1, 8, 4, 8, 16, 32]


@pytest.mark.parametrize("units", ["", "3,,3", "3,x", "0,1", "3,100", "1,1,1,1,1,1,1,1,1,1", "-1"])
def test_invalid_units_are_errors(units: str) -> None:
    with raises(UserError, "units", repr(units)):
        BitConfig(units, 64)


def test_other_invalid_fields_are_errors() -> None:
    with raises(UserError, "root_width", "0"):
        BitConfig("1", 0)
    with raises(UserError, "image_size", "0"):
        FAMILY.check_image_size(VARIANTS["R50x1"], 0, 5)
