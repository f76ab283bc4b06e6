"""Tests of the picture of a batch: it shows what the training step gives its model, and how."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from mixer_jax.data.source import Example
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.setup import build_experiment, make_train_batches
from mixer_jax.training.step import TrainState, train_step
from mixer_jax.visualization.train_batch import (
    TrainBatchView,
    denormalize,
    format_caption,
    load_train_batch,
    plot_train_batch,
)
from tests.helpers.batches import mesh_of
from tests.helpers.messages import mentions
from tests.helpers.tiny_run import small_config

STEP = 7
NAMES = tuple("0123456789")


class Spy(nn.Module):
    """A model that keeps the images it is given and answers with its parameter."""

    keep: Callable[[Any], None]
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, places: jax.Array) -> jax.Array:
        jax.debug.callback(self.keep, images)
        logits = self.param("logits", nn.initializers.zeros, (self.num_classes,))
        return jnp.broadcast_to(logits[None], (len(images), self.num_classes))


def run_step(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images that the real step gives its model, and its targets summed over them."""
    experiment = build_experiment(config, open_datasets(config))
    num_classes = experiment.model.num_classes
    batch = jax.tree.map(np.asarray, next(make_train_batches(experiment, STEP, print)))
    kept: list[np.ndarray] = []
    model = Spy(lambda images: kept.append(np.asarray(images)), num_classes)
    params = {"logits": jnp.zeros(num_classes)}
    tx = optax.sgd(1.0)
    state = TrainState(jnp.int32(STEP), params, tx.init(params), None)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=optax.constant_schedule(1.0),
        mesh=mesh_of(1, 1),
        num_classes=num_classes,
        seed=config.seed,
        **config.recipe,
    )
    state, _ = jax.jit(step)(state, batch)
    jax.effects_barrier()
    # The gradient of the softmax loss at equal answers is 1 / classes − the mean target.
    targets = (state.params["logits"] + 1 / num_classes) * config.batch_size
    return np.concatenate(kept), np.asarray(targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe__mixup": 0.0, "preprocess__randaugment_layers": 2, "preprocess__flip": True},
        {"recipe__mixup": 0.5, "recipe__label_smoothing": 0.1, "seed": 3},
    ],
)
def test_shown_is_what_the_training_step_gives_its_model(
    digits_dir: str, changes: dict[str, Any]
) -> None:
    config = small_config(digits_dir, **changes)
    expected, total = run_step(config)
    shown = load_train_batch(config, open_datasets(config).train, STEP, config.batch_size)
    np.testing.assert_array_equal(shown.images, expected)
    np.testing.assert_allclose(shown.targets.sum(0), total, atol=1e-5)
    assert (shown.weight == 1.0) == (config.recipe.mixup == 0.0)


class Counted(Sequence[Example]):
    """Examples that count how often they are read."""

    def __init__(self, examples: Sequence[Example]):
        self.examples, self.reads = examples, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return self.examples[index]


@pytest.mark.parametrize(("num_images", "mixup"), [(5, 0.0), (3, 0.5)])
def test_a_part_of_the_batch_is_the_batch_s_beginning(
    digits_dir: str, num_images: int, mixup: float
) -> None:
    config = small_config(digits_dir, recipe__mixup=mixup)
    source = open_datasets(config).train
    whole = load_train_batch(config, source, STEP, config.batch_size)
    examples = Counted(source.examples)
    counted = dataclasses.replace(source, examples=examples)
    examples.reads = 0
    part = load_train_batch(config, counted, STEP, num_images)
    for name in ("images", "targets", "labels", "partner_labels"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:num_images])
    assert part.weight == whole.weight
    # No others are prepared, but for the partner of the first.
    assert examples.reads == num_images + (mixup > 0)


def test_images_that_cannot_be_used_are_named(digits_dir: str) -> None:
    config = small_config(digits_dir, recipe__mixup=0.0)
    whole = synthetic_source("train", num_classes=10, num_examples=8, image_size=16)
    examples = list(whole.examples)
    for i in range(4, 8):
        examples[i] = Example(image=b"none", labels=(0,), name=f"example {i}")
    shown = load_train_batch(config, dataclasses.replace(whole, examples=examples), 0, 16)
    assert {bad.name for bad in shown.bad} == {f"example {i}" for i in range(4, 8)}
    title = format_caption("name", config, whole, 0, shown)
    for bad in shown.bad:
        assert mentions(title[-1], bad.name, bad.reason)


def find(picture: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Returns where in a picture the first of an image's pixels lies, all of them being there."""
    height, width = image.shape[:2]
    room = picture[: len(picture) - height + 1, : picture.shape[1] - width + 1]
    ends = picture[height - 1 :, width - 1 :]
    starts = (room == image[0, 0]).all(-1) & (ends == image[-1, -1]).all(-1)
    for y, x in np.argwhere(starts):
        if np.array_equal(picture[y : y + height, x : x + width], image):
            return int(y), int(x)
    raise AssertionError("the image is not in the picture")


def noise_images(count: int, side: int, weight: float = 1.0) -> TrainBatchView:
    """Images of noise of ten classes, mixed if `weight` is not 1."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, 3)).astype(np.float32)
    labels = np.arange(count, dtype=np.int32) % 10
    partners = (labels + (weight < 1)).astype(np.int32) % 10
    targets = np.eye(10, dtype=np.float32)
    targets = np.float32(weight) * targets[labels] + np.float32(1 - weight) * targets[partners]
    return TrainBatchView(pixels / 127.5 - 1, targets, labels, partners, weight, [])


@pytest.mark.parametrize(("count", "side", "columns"), [(1, 32, 1), (7, 100, 4), (3, 224, 3)])
def test_the_picture_has_every_pixel_in_order(
    tmp_path: Path, count: int, side: int, columns: int
) -> None:
    shown = noise_images(count, side)
    drawn = plot_train_batch(shown, NAMES, ["heading", "more of it"], "png")
    (tmp_path / "a.png").write_bytes(drawn)
    with Image.open(tmp_path / "a.png") as opened:
        picture = np.asarray(opened.convert("RGB"))
    zoom = -(-160 // side)
    pixels = denormalize(shown.images).repeat(zoom, axis=1).repeat(zoom, axis=2)
    places = [find(picture, image) for image in pixels]
    assert places == sorted(places)
    assert sum(y == places[0][0] for y, _ in places) == columns


def test_pixels_are_those_of_the_images() -> None:
    levels = np.arange(256, dtype=np.float32)
    np.testing.assert_array_equal(denormalize(levels / np.float32(127.5) - 1), levels)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts written into figures, in order."""
    texts: list[str] = []
    write = Figure.text

    def record(self: Figure, x: float, y: float, text: str, **style: Any) -> Any:
        texts.append(text)
        return write(self, x, y, text, **style)

    monkeypatch.setattr(Figure, "text", record)
    return texts


@pytest.mark.parametrize(
    ("weight", "names", "caption"),
    [
        (1.0, NAMES, "0"),
        (0.83, NAMES, "0 0.83 + 1 0.17"),
        (0.9999, NAMES, "0 1.00 + 1 0.00"),
        (1.0, ("a class with too long a name", *NAMES[1:]), "a class with too lo…"),
        (0.83, ("$5 bill", "$6", *NAMES[2:]), "$5 bill 0.83\n+ $6 0.17"),
        (
            0.83,
            ("great white shark, man-eater", "tiger shark", *NAMES[2:]),
            "great white sh… 0.83\n+ tiger shark 0.17",
        ),
    ],
)
def test_captions(written: list[str], weight: float, names: tuple[str, ...], caption: str) -> None:
    plot_train_batch(noise_images(1, 32, weight), names, ["heading"], "png")
    assert written == ["heading", caption]


def test_an_image_mixed_with_one_of_its_class_has_one_name(written: list[str]) -> None:
    shown = noise_images(1, 32, 0.83)
    shown = shown._replace(partner_labels=shown.labels, targets=np.eye(10, dtype=np.float32)[:1])
    plot_train_batch(shown, NAMES, ["heading"], "png")
    assert written[-1] == "0"
    plot_train_batch(shown._replace(targets=shown.targets * 0.91), NAMES, ["heading"], "png")
    assert written[-1] == "0 0.91"


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
        ({"recipe__label_smoothing": 0.1}, ("0.1",)),
        ({"seed": 77}, ("77",)),
    ],
)
def test_the_title_says_how_images_are_made(
    digits_dir: str, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config, usual = small_config(digits_dir, **changes), small_config(digits_dir)
    source = open_datasets(config).train
    shown = noise_images(4, 16, 0.75)
    title = format_caption("configs/digits.py", config, source, 1234, shown)
    assert mentions(title[0], "configs/digits.py", "1234", "4", "16")
    assert mentions(title[1], source.name, "16")
    assert mentions("\n".join(title), *parts)
    before = "\n".join(format_caption("configs/digits.py", usual, source, 1234, shown))
    assert "\n".join(title) != before
    assert not parts or not mentions(before, *parts)
