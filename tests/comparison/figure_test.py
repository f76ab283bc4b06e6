"""Tests of the picture of a comparison."""

from typing import Any

import numpy as np

from mixer_jax.comparison.figure import draw_comparison
from mixer_jax.comparison.plan import EvalData, Variation
from mixer_jax.comparison.table import Row, Table
from tests.comparison.table_test import OTHER, ROW


def draw(*rows: Row, variation: Variation | None = None) -> Any:
    figure = draw_comparison(
        Table(list(rows), EvalData("digits/all", "test"), variation, "", [], [])
    )
    if figure is not None:
        figure.canvas.draw()
    return figure


def points(axes: Any) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for container in axes.containers
        for x, y in container.lines[0].get_xydata()
    ]


def test_accuracy_is_drawn_over_cost_and_throughput() -> None:
    cost, throughput = draw(ROW, OTHER).axes
    assert points(cost) == [(1.5, 98.5), (3.0, 98.25)]
    assert points(throughput) == [(1234.5678, 98.5), (1234.5678, 98.25)]
    assert {axes.get_xscale() for axes in (cost, throughput)} == {"log"}
    assert "minutes" in cost.get_xlabel()
    assert [text.get_text() for text in cost.texts] == ["small", "large|x"]


def test_models_of_a_family_share_color_and_legend() -> None:
    cost, _ = draw(ROW, OTHER).axes
    assert [text.get_text() for text in cost.get_legend().get_texts()] == ["Mixer"]
    colors = {container.lines[0].get_color() for container in cost.containers}
    assert len(colors) == 1


def test_without_accuracy_there_is_no_picture() -> None:
    assert draw(ROW._replace(top1=())) is None


def test_checkpoints_of_unknown_cost_are_drawn_over_flops() -> None:
    (axes,) = draw(ROW._replace(device_seconds=None, images_per_second=None)).axes
    assert points(axes) == [(ROW.forward_flops, 98.5)]


def test_fractions_of_the_data_are_drawn_by_their_number_of_images() -> None:
    variation = Variation("dataset.train_split", ("train[:50%]", "train"))
    rows = [
        ROW._replace(value=v, num_train=n) for v, n in zip(variation.values, (50, 100), strict=True)
    ]
    (axes,) = draw(*rows, variation=variation).axes
    assert points(axes) == [(50.0, 98.5), (100.0, 98.5)]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "training images"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "100"]


def test_categories_stand_next_to_each_other() -> None:
    variation = Variation("preprocess.eval_crop", ("square", "resize"))
    rows = [row._replace(value=v) for row in (ROW, OTHER) for v in variation.values]
    (axes,) = draw(*rows, variation=variation).axes
    x = np.array([x for x, _ in points(axes)])
    np.testing.assert_allclose(x, [-0.06, 0.94, 0.06, 1.06])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["square", "resize"]


def test_numbers_of_a_varied_key_are_positions() -> None:
    variation = Variation("optimizer.learning_rate", ("0.001", "0.01"))
    rows = [ROW._replace(value=v) for v in variation.values]
    (axes,) = draw(*rows, variation=variation).axes
    assert [x for x, _ in points(axes)] == [0.001, 0.01]
    assert axes.get_xlabel() == "learning_rate"
