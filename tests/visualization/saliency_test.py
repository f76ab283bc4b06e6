"""Tests of the plot of saliency."""

import io
from typing import Any

import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.evaluation.saliency import Saliency
from mixer_jax.visualization.saliency import describe_saliency, plot_saliency
from tests.helpers.messages import mentions, raises


def make_saliency(
    method: Any = "occlusion", image: str = "photos/a.jpg", **fields: Any
) -> Saliency:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 9)).astype(np.float32)
    values[4, 2] = 9.0
    values = values if method == "occlusion" else np.abs(values)
    pixels = rng.integers(0, 256, (6, 9, 3), np.uint8)
    fields = {"name": "tabby", "probability": 0.875, **fields}
    return Saliency(image, pixels, 2, fields["name"], fields["probability"], method, values)


@pytest.mark.parametrize("method", ["occlusion", "gradient"])
def test_plot_saliency_draws_the_image_and_the_values_over_it(method: Any) -> None:
    saliency = make_saliency(method)
    left, right, bar = plot_saliency(saliency).axes
    np.testing.assert_array_equal(left.get_images()[0].get_array(), saliency.pixels)
    gray, overlay = right.get_images()
    assert gray.get_array().shape == (6, 9)
    np.testing.assert_array_equal(overlay.get_array(), saliency.values)
    assert overlay.get_clim() == ((-9.0 if method == "occlusion" else 0.0), 9.0)
    assert overlay.get_alpha()[4, 2] == 1
    assert mentions(left.get_title(), "photos/a.jpg")
    assert mentions(right.get_title(), "tabby", "87.5%")
    assert mentions(bar.get_ylabel(), "log-odds")


@pytest.mark.parametrize(("count", "num_axes"), [(1, 3), (2, 6), (3, 11)])
def test_plot_saliency_draws_several_images(count: int, num_axes: int) -> None:
    figure = plot_saliency([make_saliency(image=f"{i}.jpg") for i in range(count)])
    assert len(figure.axes) == num_axes
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title.endswith(".jpg")] == [
        f"{i}.jpg" for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 25])
def test_plot_saliency_refuses_more_images_than_fit(count: int) -> None:
    with raises(UserError, "1", "24", str(count)):
        plot_saliency([make_saliency()] * count)


def test_plot_saliency_of_zeros_and_of_names_with_dollar_signs() -> None:
    saliency = make_saliency(name="$5 bill", image="a long folder/" * 9 + "$a.jpg")
    zeros = saliency._replace(values=np.zeros((6, 9), np.float32))
    figure = plot_saliency([saliency, zeros])
    figure.savefig(io.BytesIO(), format="png")
    title = figure.axes[0].get_title()
    assert title.startswith("…")
    assert title.endswith("/$a.jpg")
    assert len(title) < 30


def test_describe_saliency_names_the_largest_value() -> None:
    text = describe_saliency(make_saliency())
    assert mentions(text, "photos/a.jpg", "tabby", "87.50%", "9", "row 4", "column 2")
