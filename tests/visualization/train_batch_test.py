"""Tests of the plot of a training batch: it shows what the training step feeds to the model."""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mixer_jax.config.schema import RunConfig
from mixer_jax.data.source import Example
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.execution import Execution
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.setup import build_experiment, make_train_batches
from mixer_jax.training.step import Hyperparams, TrainState, jit_train_step, train_step
from mixer_jax.visualization.figures import DPI, render_figure
from mixer_jax.visualization.train_batch import (
    TrainBatchView,
    denormalize,
    draw_train_batch,
    format_caption,
    format_label,
    load_train_batch,
)
from tests.helpers.batches import mesh_of
from tests.helpers.messages import mentions
from tests.helpers.tiny_run import small_config

STEP = 7
NAMES = tuple("0123456789")


class RecordingModel(nn.Module):
    """Model that records its images and returns its parameter as logits."""

    family: ClassVar[str] = "mixer"
    record: Callable[[Any], None]
    num_classes: int
    config: None = None
    execution: Execution = Execution(backend="xla")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, example_index: jax.Array) -> jax.Array:
        jax.debug.callback(self.record, images)
        logits = self.param("logits", nn.initializers.zeros, (self.num_classes,))
        return jnp.broadcast_to(logits[None], (len(images), self.num_classes))


def run_step(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Takes a training step; returns the images of the model, and the sum of their targets."""
    experiment = build_experiment(config, open_datasets(config))
    num_classes = experiment.model.num_classes
    batch = jax.tree.map(np.asarray, next(make_train_batches(experiment, STEP, print)))
    recorded: list[np.ndarray] = []
    model = RecordingModel(lambda images: recorded.append(np.asarray(images)), num_classes)
    params = {"logits": jnp.zeros(num_classes)}
    mesh = mesh_of(1, 1)
    state = TrainState(
        jnp.int32(STEP), params, optax.sgd(optax.constant_schedule(1.0)).init(params), None
    )
    sharding = state_sharding(state, mesh, get_family("mixer"))
    step = jit_train_step(
        functools.partial(
            train_step,
            recipe=config.recipe,
            model=model,
            make_schedule=optax.constant_schedule,
            make_tx=optax.sgd,
            mesh=mesh,
        ),
        sharding,
        mesh,
        model,
    )
    state, _ = step(state, batch, Hyperparams(np.float32(1.0), np.uint32(config.seed)))
    jax.effects_barrier()
    # The gradient of the softmax loss at equal logits is 1 / classes − the mean target.
    targets = (state.params["logits"] + 1 / num_classes) * config.batch_size
    return np.concatenate(recorded), np.asarray(targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe__mixup": 0.0, "preprocess__randaugment_layers": 2, "preprocess__flip": True},
        {"recipe__mixup": 0.5, "recipe__label_smoothing": 0.1, "seed": 3},
        {"recipe__cutmix": 1.0, "recipe__mixup": 0.0, "preprocess__random_erasing": 0.5},
        {"recipe__cutmix": 1.0, "recipe__mixup": 0.5, "recipe__mixup_switch_prob": 0.0},
        {"recipe__cutmix": 1.0, "recipe__mixup": 0.5, "recipe__mixup_switch_prob": 1.0},
    ],
)
def test_load_train_batch_equals_the_inputs_of_the_training_step(
    digits_dir: str, changes: dict[str, Any]
) -> None:
    config = small_config(digits_dir, **changes)
    images, targets = run_step(config)
    view = load_train_batch(config, open_datasets(config).train, STEP, config.batch_size)
    np.testing.assert_array_equal(view.images, images)
    np.testing.assert_allclose(view.targets.sum(0), targets, atol=1e-5)
    recipe = config.recipe
    assert (view.weight == 1.0) == (recipe.mixup == recipe.cutmix == 0.0)
    is_cutmix = recipe.cutmix > 0 and (recipe.mixup == 0 or recipe.mixup_switch_prob == 1)
    assert view.is_cutmix == is_cutmix


class CountingExamples(Sequence[Example]):
    """Examples that count how often they are read."""

    def __init__(self, examples: Sequence[Example]):
        self.examples, self.num_reads = examples, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        return self.examples[index]


@pytest.mark.parametrize(("num_images", "mixup"), [(5, 0.0), (3, 0.5)])
def test_load_train_batch_reads_only_the_images_it_returns(
    digits_dir: str, num_images: int, mixup: float
) -> None:
    config = small_config(digits_dir, recipe__mixup=mixup)
    source = open_datasets(config).train
    batch = load_train_batch(config, source, STEP, config.batch_size)
    examples = CountingExamples(source.examples)
    counted = dataclasses.replace(source, examples=examples)
    examples.num_reads = 0
    view = load_train_batch(config, counted, STEP, num_images)
    for name in ("images", "targets", "labels", "partner_labels"):
        np.testing.assert_array_equal(getattr(view, name), getattr(batch, name)[:num_images])
    assert view.weight == batch.weight
    # With mixup, the partner of the first one, too.
    assert examples.num_reads == num_images + (mixup > 0)


def test_images_with_several_labels_are_drawn_with_all_of_them(shapes_dir: str) -> None:
    settings = {"dataset__name": "mixer_shapes", "recipe__loss": "sigmoid"}
    config = small_config(shapes_dir, **settings, recipe__mixup=0.5)
    source = open_datasets(config).train
    view = load_train_batch(config, source, STEP, config.batch_size)
    mixed = view.weight * view.labels + (1 - view.weight) * view.partner_labels
    np.testing.assert_allclose(view.targets, mixed, atol=1e-6)
    assert not view.labels.any(axis=1).all()
    for row in range(config.batch_size):
        own, partner = format_label(view, row, source.class_names, 100).splitlines()
        for line, labels in ((own, view.labels[row]), (partner, view.partner_labels[row])):
            named = [name in line for name in source.class_names]
            assert named == labels.tolist()
            assert ("no label" in line) == (not labels.any())
        assert mentions(own, f"{view.weight:.2f}")
    assert draw_train_batch(view, source.class_names, ["title"])


def test_format_caption_names_bad_images(digits_dir: str) -> None:
    config = small_config(digits_dir, recipe__mixup=0.0)
    source = synthetic_source("train", num_classes=10, num_examples=8, image_size=16)
    examples = list(source.examples)
    for i in range(4, 8):
        examples[i] = Example(image=b"none", labels=(0,), name=f"example {i}")
    view = load_train_batch(config, dataclasses.replace(source, examples=examples), 0, 16)
    assert {bad.name for bad in view.bad} == {f"example {i}" for i in range(4, 8)}
    title = format_caption("name", config, source, 0, view)
    for bad in view.bad:
        assert mentions(title[-1], bad.name, bad.reason)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"preprocess__max_shift": 3}, ("3",)),
        ({"preprocess__train_crop": "resize"}, ()),
        ({"preprocess__flip": True}, ()),
        ({"preprocess__train_crop": "inception"}, ("5%",)),
        ({"preprocess__randaugment_layers": 2}, ("RandAugment", "2", "10")),
        ({"recipe__mixup": 0.0}, ()),
        ({"recipe__mixup": 0.5}, ("0.5", "0.750", "0.250")),
        ({"recipe__cutmix": 1.0}, ("mixup", "0.2", "CutMix", "1", "probability", "0.5")),
        ({"recipe__cutmix": 1.0, "recipe__mixup": 0.0}, ("CutMix", "1", "0.250")),
        ({"preprocess__random_erasing": 0.25}, ("erasing", "25%", "gray")),
        ({"recipe__label_smoothing": 0.1}, ("0.1",)),
        ({"preprocess__permute": "pixels"}, ("all pixels",)),
        ({"preprocess__permute": "patches"}, ("patches", "16", "permuted")),
        ({"seed": 77}, ("77",)),
    ],
)
def test_format_caption_describes_images_and_labels(
    digits_dir: str, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config, default = small_config(digits_dir, **changes), small_config(digits_dir)
    source = open_datasets(config).train
    view = random_view(4, 16, 0.75)
    title = format_caption("configs/digits.py", config, source, 1234, view)
    assert mentions(title[0], "configs/digits.py", "1234", "4", "16")
    assert mentions(title[1], source.name, "16")
    assert mentions("\n".join(title), *parts)
    default_title = "\n".join(format_caption("configs/digits.py", default, source, 1234, view))
    assert "\n".join(title) != default_title
    assert not parts or not mentions(default_title, *parts)


def random_view(count: int, size: int, weight: float = 1.0) -> TrainBatchView:
    """Creates images of noise of ten classes, with mixup if `weight` is not 1."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3)).astype(np.float32)
    labels = np.arange(count, dtype=np.int32) % 10
    partners = (labels + (weight < 1)).astype(np.int32) % 10
    one_hot = np.eye(10, dtype=np.float32)
    targets = np.float32(weight) * one_hot[labels] + np.float32(1 - weight) * one_hot[partners]
    return TrainBatchView(pixels / 127.5 - 1, targets, labels, partners, weight, False, [])


def labels_of(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize(("count", "size", "columns"), [(1, 32, 1), (7, 100, 4), (3, 224, 3)])
def test_draw_train_batch_shows_every_image_in_order(count: int, size: int, columns: int) -> None:
    view = random_view(count, size)
    figure = draw_train_batch(view, NAMES, ["heading", "details"])
    assert len(figure.axes) == count
    for index, (axes, pixels) in enumerate(zip(figure.axes, denormalize(view.images), strict=True)):
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), pixels)
        position = axes.get_subplotspec()
        assert (position.rowspan.start, position.colspan.start) == divmod(index, columns)


def test_draw_train_batch_writes_the_whole_title() -> None:
    title = ["heading", "a long paragraph " * 20]
    figure = draw_train_batch(random_view(2, 16), NAMES, title)
    lines = figure.get_suptitle().splitlines()
    assert lines[0] == "heading"
    assert " ".join(lines[1:]) == title[1].strip()


@pytest.mark.parametrize(
    ("weight", "names", "label"),
    [
        (1.0, NAMES, "0"),
        (0.83, NAMES, "0 0.83\n+ 1 0.17"),
        (0.9999, NAMES, "0 1.00\n+ 1 0.00"),
        (1.0, ("a class with too long a name", *NAMES[1:]), "a class with too l…"),
        (1.0, ("n01440764", *NAMES[1:]), "tench (n01440764)"),
        (0.83, ("$5 bill", "$6", *NAMES[2:]), "$5 bill 0.83\n+ $6 0.17"),
        (
            0.83,
            ("great white shark, man-eater", "tiger shark", *NAMES[2:]),
            "great white s… 0.83\n+ tiger shark 0.17",
        ),
    ],
)
def test_draw_train_batch_labels_images_with_classes_and_targets(
    weight: float, names: tuple[str, ...], label: str
) -> None:
    figure = draw_train_batch(random_view(1, 32, weight), names, ["heading"])
    assert labels_of(figure) == [label]
    # A dollar sign starts no formula.
    figure.savefig(io.BytesIO(), format="png")


def test_draw_train_batch_names_the_class_of_both_partners_once() -> None:
    view = random_view(1, 32, 0.83)
    view = view._replace(partner_labels=view.labels, targets=np.eye(10, dtype=np.float32)[:1])
    assert labels_of(draw_train_batch(view, NAMES, ["heading"])) == ["0"]
    smoothed = view._replace(targets=view.targets * 0.91)
    assert labels_of(draw_train_batch(smoothed, NAMES, ["heading"])) == ["0 0.91"]


@pytest.mark.parametrize(("count", "size"), [(1, 224), (6, 300), (32, 100)])
def test_draw_train_batch_has_room_for_every_pixel(count: int, size: int) -> None:
    figure = draw_train_batch(random_view(count, size), NAMES, ["heading"])
    extent = figure.axes[0].get_window_extent()
    scale = DPI / figure.dpi
    assert extent.width * scale >= size
    assert extent.height * scale >= size


def test_draw_train_batch_renders_all_images() -> None:
    """Every image has another shade of red, and the plot has all of them."""
    view = random_view(8, 16)
    colors = np.linspace(-1, 1, 8, dtype=np.float32)
    images = np.broadcast_to(colors[:, None, None, None], view.images.shape).copy()
    # Red alone, which nothing else in the plot is.
    images[..., 1:] = -1
    figure = draw_train_batch(view._replace(images=images), NAMES, ["heading"])
    rendered = render_figure(figure, "png")
    picture = np.asarray(Image.open(io.BytesIO(rendered)).convert("RGB"))
    reds = {tuple(color) for color in denormalize(images)[1:, 0, 0].tolist()}
    assert reds <= {tuple(color) for color in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


def test_denormalize_restores_pixel_values() -> None:
    values = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(denormalize(values / np.float32(127.5) - 1), values)
