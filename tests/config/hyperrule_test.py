"""Tests of BiT-HyperRule: the bounds between its cases."""

import pytest

from mixer_jax.config.hyperrule import bit_hyperrule


@pytest.mark.parametrize(
    ("num_examples", "steps", "mixup"),
    [
        (1_000, 500, 0.0),
        (19_999, 500, 0.0),
        (20_000, 10_000, 0.1),
        (499_999, 10_000, 0.1),
        (500_000, 20_000, 0.1),
    ],
)
def test_steps_and_mixup_depend_on_the_number_of_examples(
    num_examples: int, steps: int, mixup: float
) -> None:
    keys = bit_hyperrule(num_examples, 96 * 96)
    assert (keys["num_steps"], keys["recipe.mixup"]) == (steps, mixup)


@pytest.mark.parametrize(
    ("image_area", "large_image_size", "sizes"),
    [
        (96 * 96 - 1, 384, (160, 128)),
        (96 * 96, 384, (448, 384)),
        (96 * 96, 480, (512, 480)),
        (32 * 32, 480, (160, 128)),
    ],
)
def test_resolution_depends_on_the_area_of_images(
    image_area: int, large_image_size: int, sizes: tuple[int, int]
) -> None:
    keys = bit_hyperrule(1_000, image_area, large_image_size)
    assert (keys["preprocess.resize_size"], keys["image_size"]) == sizes
