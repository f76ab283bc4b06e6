"""Tests of the plots of weights: known waves are found, paired and sorted, and noise is not."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import get_family
from mixer_jax.models.stack import forward_intermediates
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.visualization import units as units_module
from mixer_jax.visualization.figures import DPI
from mixer_jax.visualization.units import (
    describe_units,
    noise_frequency,
    plot_filters,
    plot_units,
    read_filters,
    read_units,
    sort_filters,
    sort_units,
    spectral_centroids,
)
from tests.helpers.messages import mentions, raises
from tests.helpers.planted import halves_task, initial_weights, train
from tests.helpers.random_weights import random_weights

ROWS, COLUMNS = 6, 8
# Waves per height and width, by rising frequency.
WAVES = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (0, 3), (2, 3), (3, 4)]
VIT, BIT = VitConfig(1, 4, 16, 24, 2), BitConfig("1,1", 8, "7x7")


def wave(rows: int, columns: int, phase: float = 0.0) -> np.ndarray:
    """Draws a wave over the grid of patches."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return np.cos(2 * np.pi * (rows * y / ROWS + columns * x / COLUMNS) + phase)


def make_waves(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes pairs of waves with opposite phases, and the pair of each, both shuffled."""
    rng = np.random.default_rng(seed)
    maps = [s * a * wave(*w) for w in WAVES for s, a in ((1, rng.uniform(0.1, 1)), (-1, 0.4))]
    order = rng.permutation(len(maps))
    return np.stack(maps)[order].astype(np.float32), (np.arange(len(maps)) // 2)[order]


def waves_model(num_blocks: int = 2) -> tuple[PretrainedWeights, list[np.ndarray]]:
    """Makes a Mixer whose hidden units are waves, and the frequency rank of each unit."""
    config = MixerConfig(num_blocks, 4, 8, 2 * len(WAVES), 12)
    weights = random_weights(config, (4 * ROWS, 4 * COLUMNS))
    blocks = [make_waves(seed) for seed in range(num_blocks)]
    kernel = np.stack([maps.reshape(len(maps), -1).T for maps, _ in blocks])
    weights.params["blocks"]["token_mixing"]["Dense_0"]["kernel"] = kernel
    return weights, [pairs for _, pairs in blocks]


def test_waves_are_paired_and_sorted() -> None:
    maps, pairs = make_waves(seed=0)
    result = sort_units(maps)
    assert pairs[result.indices].tolist() == [i // 2 for i in range(2 * len(WAVES))]
    np.testing.assert_allclose(result.similarities, -1, atol=1e-6)
    np.testing.assert_array_equal(result.maps, maps[result.indices])
    expected = [np.hypot(r / ROWS, c / COLUMNS) for r, c in WAVES for _ in range(2)]
    np.testing.assert_allclose(result.frequencies, expected, atol=1e-6)


def test_noisy_waves_of_four_phases_are_paired_with_their_opposites() -> None:
    rng = np.random.default_rng(0)
    phases = np.array([0, 0.5, 1, 1.5]) * np.pi
    waves = WAVES[1:7]
    maps = np.stack([wave(*w, phase) for w in waves for phase in phases])
    maps += rng.normal(0, 0.2, maps.shape)
    order = rng.permutation(len(maps))
    result = sort_units(maps[order])
    first, second = order[result.indices].reshape(-1, 2).T
    assert (first // 4 == second // 4).all()
    assert (abs(first - second) == 2).all()
    assert (result.similarities < -0.8).all()
    assert (np.diff(result.frequencies.reshape(-1, 2).mean(1)) >= 0).all()


@pytest.mark.parametrize(("count", "num_pairs"), [(1, 0), (2, 1), (5, 2)])
def test_units_without_a_partner_come_last(count: int, num_pairs: int) -> None:
    maps = np.random.default_rng(0).normal(size=(count, 3, 4))
    result = sort_units(maps)
    assert sorted(result.indices.tolist()) == list(range(count))
    assert len(result.similarities) == num_pairs
    assert mentions(describe_units(result), f"{count} units")


def test_units_of_zeros_are_sorted_without_warnings() -> None:
    result = sort_units(np.zeros((4, 3, 3)))
    assert result.frequencies.tolist() == [0, 0, 0, 0]
    assert result.similarities.tolist() == [0, 0]


def test_spectral_centroids_of_known_maps() -> None:
    checkerboard = np.indices((4, 4)).sum(0) % 2 * 2.0 - 1
    maps = np.stack([np.ones((4, 4)), checkerboard, np.eye(4) * 0])
    np.testing.assert_allclose(spectral_centroids(maps), [0, np.sqrt(0.5), 0], atol=1e-12)
    # The powers of channels are added: half of the power at 1/4, and half at zero.
    stripes = np.tile(np.array([1.0, 0, -1, 0]), (4, 1))
    color = np.stack([stripes, np.full((4, 4), np.sqrt(0.5))], axis=-1)
    np.testing.assert_allclose(spectral_centroids(color[None]), [0.125])


def test_noise_has_the_frequency_of_noise() -> None:
    maps = np.random.default_rng(0).normal(size=(2_000, ROWS, COLUMNS))
    assert spectral_centroids(maps).mean() == pytest.approx(
        noise_frequency(ROWS, COLUMNS), abs=0.003
    )


def mosaic_cells(figure: Any, panel: int, gap: int = 1) -> list[np.ndarray]:
    """Returns the maps of a panel of units as they are drawn, row by row."""
    mosaic = np.ma.filled(figure.axes[2 * panel].get_images()[0].get_array(), np.nan)
    cells = []
    for top in range(0, len(mosaic), ROWS + gap):
        left = 0
        while left < mosaic.shape[1]:
            for _ in range(2):
                cells.append(mosaic[top : top + ROWS, left : left + COLUMNS])
                left += COLUMNS + gap
            left += 2 * gap
    return [cell for cell in cells if not np.isnan(cell).any()]


def test_plot_units_draws_every_block_in_order() -> None:
    weights, pairs = waves_model(num_blocks=2)
    figure = plot_units(weights, block=None)
    units = read_units(weights)
    for block in range(2):
        drawn = mosaic_cells(figure, block)
        expected = units[block][sort_units(units[block]).indices]
        np.testing.assert_array_equal(np.stack(drawn), expected)
        ranks = [int(pairs[block][(units[block] == cell).all((1, 2)).argmax()]) for cell in drawn]
        assert ranks == [i // 2 for i in range(2 * len(WAVES))]
        image = figure.axes[2 * block].get_images()[0]
        low, high = image.get_clim()
        assert low == -high
        assert high > 0
        assert mentions(figure.axes[2 * block].get_title(loc="left"), f"block {block}", "16 units")
    assert mentions(figure.texts[0].get_text(), weights.model_info.name)


def test_plot_units_draws_weights_in_whole_pixels() -> None:
    figure = plot_units(waves_model()[0], block=1)
    axes = figure.axes[0]
    box = axes.get_window_extent()
    height, width = axes.get_images()[0].get_array().shape
    for length, count in ((box.width, width), (box.height, height)):
        zoom = length / count * DPI / figure.dpi
        assert zoom >= 1
        assert zoom == pytest.approx(round(zoom), abs=1e-3)


def test_plot_units_accepts_a_classifier() -> None:
    weights, _ = waves_model()
    drawn = mosaic_cells(plot_units(Classifier(weights, "float32")), 0)
    expected = mosaic_cells(plot_units(weights, 0), 0)
    np.testing.assert_array_equal(drawn, expected)


def test_units_are_the_weights_that_the_model_applies_to_patches() -> None:
    weights = random_weights(MixerConfig(1, 4, 8, 6, 12), (8, 12))
    units = read_units(weights)
    assert units.shape == (1, 6, 2, 3)
    kernel = weights.params["blocks"]["token_mixing"]["Dense_0"]["kernel"]
    # Tokens are in raster order.
    np.testing.assert_array_equal(units[0, 4, 1, 2], kernel[0, 1 * 3 + 2, 4])


@pytest.mark.parametrize("config", [VIT, BIT], ids=["vit", "bit"])
def test_models_without_token_mixing_are_refused(config: Any) -> None:
    weights = random_weights(config)
    with raises(UserError, weights.model_info.name, "visualize filters"):
        plot_units(weights)


@pytest.mark.parametrize("block", [-1, 2])
def test_blocks_out_of_range_are_refused(block: int) -> None:
    with raises(UserError, "block", "0", "1", str(block)):
        plot_units(waves_model()[0], block=block)


def test_figures_that_would_not_fit_in_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units_module, "_MAX_PIXELS", 500_000)
    with raises(UserError, "500000", "2 blocks"):
        plot_units(waves_model()[0], block=None)


@pytest.mark.parametrize("config", [MixerConfig(1, 4, 16, 8, 24), VIT, BIT], ids=type)
def test_filters_are_what_the_first_layer_applies_to_pixels(config: Any) -> None:
    weights = random_weights(config)
    filters = read_filters(weights)
    assert filters.shape[2] == 3
    model = weights.model_info.build_model("float32")
    if not get_family(weights.model_info.family).stem:
        np.testing.assert_allclose(filters.mean((0, 1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(filters.std((0, 1, 2)), 1, atol=1e-4)
        return
    image = np.zeros((1, 16, 16, 3), np.float32)
    image[0, :4, :4] = filters[..., 0]

    def stem_of(images: np.ndarray) -> Any:
        _, named = forward_intermediates(model, weights.params, jnp.asarray(images))
        return np.asarray(named["stem"])

    response = (stem_of(image) - stem_of(0 * image))[0, 0]
    expected = np.einsum("hwc,hwcn->n", filters[..., 0], filters)
    np.testing.assert_allclose(response, expected, rtol=1e-4, atol=1e-4)


def test_filters_are_sorted_and_drawn_in_color() -> None:
    rng = np.random.default_rng(0)
    color = np.array([1.0, -0.5, 0.25])
    x = np.indices((8, 8))[1]
    waves = [np.cos(np.pi * rank * x / 4) for rank in range(5)]
    order = rng.permutation(5)
    filters = np.stack([waves[rank][..., None] * color for rank in order], axis=-1)
    drawn = sort_filters(filters)
    np.testing.assert_array_equal(drawn, np.stack([w[..., None] * color for w in waves]))
    weights = random_weights(MixerConfig(1, 8, 5, 8, 24))
    weights.params["stem"]["kernel"] = filters.astype(np.float32)
    figure = plot_filters(weights)
    pixels = figure.axes[0].get_images()[0].get_array()
    # The first is constant and red: the largest weight is 1, and zero is gray.
    np.testing.assert_allclose(pixels[0, 0], [1.0, 0.25, 0.625])
    assert len(figure.axes) == 1
    assert mentions(figure.axes[0].get_title(loc="left"), "5 filters", "8")
    gray = plot_filters(weights, gray=True).axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(gray[0, 0], [1.0, 1.0, 1.0])


def test_family_without_known_filters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_family("vit")), "stem", "")
    with raises(UserError, "filters", "ViT-custom"):
        plot_filters(random_weights(VIT))


def test_titles_name_permuted_images() -> None:
    weights = random_weights(permutation=PixelPermutation("patches", 4, 0))
    for figure in (plot_units(weights), plot_filters(weights)):
        assert mentions(figure.texts[0].get_text(), "patches", "permuted")


@pytest.mark.slow
def test_training_lowers_the_frequency_of_units_and_filters_below_noise() -> None:
    """Random weights are the control: the same statistic is that of noise."""
    config = MixerConfig(1, 2, 16, 16, 32)
    untrained = initial_weights(config, 4)
    trained = train(untrained, halves_task(2_000, 0), num_steps=300, weight_decay=1.0)

    def frequency(weights: PretrainedWeights) -> float:
        return float(spectral_centroids(read_units(weights)[0]).mean())

    def filter_frequency(weights: PretrainedWeights) -> float:
        return float(spectral_centroids(sort_filters(read_filters(weights))).mean())

    noise = noise_frequency(8, 8)
    print(
        f"noise {noise:.3f}, untrained {frequency(untrained):.3f}, trained {frequency(trained):.3f}"
    )
    assert frequency(untrained) == pytest.approx(noise, abs=0.03)
    assert frequency(trained) < noise - 0.1
    assert filter_frequency(trained) < filter_frequency(untrained)
    median = [np.median(sort_units(read_units(w)[0]).similarities) for w in (untrained, trained)]
    assert median[1] < median[0]
