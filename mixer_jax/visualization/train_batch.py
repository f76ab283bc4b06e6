"""The picture of a training batch: its images and labels, as the model will see them."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from ml_collections import ConfigDict

from mixer_jax.data.readers import BadImage, TrainReader
from mixer_jax.data.source import Source
from mixer_jax.models.layers import normalize_images
from mixer_jax.training.setup import train_preprocess_args
from mixer_jax.training.step import apply_mixup, sample_mixup, smooth_labels, step_rngs

# Lengths in the drawing, in pixels; an image smaller than a cell is enlarged by a whole number.
_DPI = 100
_CELL = 160
_GAP = 10
_MARGIN = 24
_NARROWEST = 960
# Sizes of text in points; then the pixels a line and a letter take at these sizes.
_POINTS, _LINE, _LETTER = 9, 16, 8
_HEADING_POINTS, _HEADING_LINE, _HEADING_LETTER = 13, 26, 12


class TrainBatchView(NamedTuple):
    """The first images of a step's batch, after crop, augmentation and mixup.

    Attributes:
        images: as the model takes them, in [-1, 1].
        targets: what the loss compares the model's answers with.
        labels: indices of the images' own classes.
        partner_labels: of the images mixed into them; their own where nothing is mixed.
        weight: share of the own image and label; 1 where nothing is mixed.
        bad: images that could not be used, so that others stand in their place.
    """

    images: Float32[np.ndarray, "n s s 3"]
    targets: Float32[np.ndarray, "n classes"]
    labels: Int32[np.ndarray, " n"]
    partner_labels: Int32[np.ndarray, " n"]
    weight: float
    bad: list[BadImage]


def load_train_batch(
    config: ConfigDict, source: Source, step: int, num_images: int
) -> TrainBatchView:
    """Prepares the first images of a training batch, and no others, as the run would.

    Args:
        config: of the run, valid by `config.validate`.
        source: that the run trains on.
        step: steps done before it: 0 for the first batch.
        num_images: at most the batch.
    """
    mixup = config.recipe.mixup
    # An image's partner is the one before it, and the first one's is the last of the batch: with
    # that in front, rolling these few by one pairs them as rolling the whole batch would.
    rows = np.arange(-1 if mixup else 0, num_images) % config.batch_size
    reader = TrainReader(source, config.seed, config.image_size, train_preprocess_args(config))
    arrays, bad = reader(step * config.batch_size + rows)

    def finish(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets = smooth_labels(labels, source.num_classes, config.recipe.label_smoothing)
        if not mixup:
            return normalize_images(images), targets, jnp.ones(())
        mixup_rng, _ = step_rngs(config.seed, step)
        pairs = sample_mixup(mixup_rng, images, targets, mixup)
        return *apply_mixup(pairs.arrays, pairs.weight), pairs.weight

    # Compiled, as the training step is, so that the compiler rounds alike.
    images, targets, weight = jax.jit(finish)(arrays["image"], arrays["label"])
    labels = arrays["label"]
    partner_labels = np.roll(labels, 1) if mixup else labels
    first = len(rows) - num_images
    return TrainBatchView(
        np.asarray(images)[first:],
        np.asarray(targets)[first:],
        labels[first:],
        partner_labels[first:],
        float(weight),
        bad,
    )


def plot_train_batch(
    shown: TrainBatchView, class_names: Sequence[str], title: Sequence[str], file_format: str
) -> bytes:
    """Returns a picture file of images in a grid, each over its label.

    Args:
        shown: from `load_train_batch`.
        class_names: a name for each class.
        title: a heading, then paragraphs in smaller letters, as `format_caption` makes them.
        file_format: "png", "jpg" or "pdf".
    """
    # Drawn without pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    count, side = shown.images.shape[:2]
    zoom = math.ceil(_CELL / side)
    cell = side * zoom
    columns = math.ceil(math.sqrt(2 * count))
    width = max(2 * _MARGIN + columns * (cell + _GAP) - _GAP, _NARROWEST)
    text_width = width - 2 * _MARGIN
    heading = textwrap.wrap(title[0], text_width // _HEADING_LETTER)
    details = [line for text in title[1:] for line in textwrap.wrap(text, text_width // _LETTER)]
    captions = [_caption(shown, row, class_names, cell // _LETTER) for row in range(count)]
    row_height = cell + 2 * _GAP + _LINE * max(len(caption) for caption in captions)
    top = _MARGIN + len(heading) * _HEADING_LINE + len(details) * _LINE + _GAP
    height = top + math.ceil(count / columns) * row_height + _MARGIN

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def write(x: float, y: int, line: str, **style: Any) -> None:
        # A dollar in the name of a class begins no formula.
        figure.text(x / width, 1 - y / height, line, va="top", parse_math=False, **style)

    y = _MARGIN
    for line in heading:
        write(_MARGIN, y, line, fontsize=_HEADING_POINTS)
        y += _HEADING_LINE
    for line in details:
        write(_MARGIN, y, line, fontsize=_POINTS)
        y += _LINE
    canvas = np.full((height, width, 3), 255, np.uint8)
    for index, image in enumerate(denormalize(shown.images)):
        row, column = divmod(index, columns)
        x, y = _MARGIN + column * (cell + _GAP), top + row * row_height
        canvas[y : y + cell, x : x + cell] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        caption = "\n".join(captions[index])
        write(
            x + cell / 2, y + cell + 4, caption, ha="center", fontsize=_POINTS, family="monospace"
        )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # Pixel for pixel: what is looked at must be what the model gets.
    axes.imshow(canvas, interpolation="none", aspect="auto")
    picture = io.BytesIO()
    figure.savefig(picture, format=file_format)
    return picture.getvalue()


def format_caption(
    name: str, config: ConfigDict, source: Source, step: int, shown: TrainBatchView
) -> list[str]:
    """Returns a picture's title: which images it shows, then how they and their labels were made.

    Args:
        name: of the config, for people.
        config: as `load_train_batch` took it.
        source: likewise.
        step: likewise.
        shown: what it returned.
    """
    preprocess, recipe = config.preprocess, config.recipe
    crop = {
        "inception": f"inception crop of {preprocess.min_area:.0%} or more of the image",
        "random_crop": "random crop of 7/8 of each side",
        "random_shift": f"the whole image, shifted by up to {preprocess.max_shift} pixels",
        "resize": "the whole image",
    }[preprocess.train_crop]
    flip = "half are flipped" if preprocess.flip else "none is flipped"
    augment = "no RandAugment"
    if preprocess.randaugment_layers:
        augment = (
            f"RandAugment with {preprocess.randaugment_layers} layers of magnitude "
            f"{preprocess.randaugment_magnitude:g}"
        )
    labels = "no mixup"
    if recipe.mixup:
        labels = (
            f"mixup {recipe.mixup:g}: at this step {shown.weight:.3f} of each image and "
            f"{1 - shown.weight:.3f} of the one before it"
        )
    if recipe.label_smoothing:
        labels += f"; label smoothing {recipe.label_smoothing:g}"
    title = [
        f"{name}, step {step:,}: {len(shown.images):,} of {config.batch_size:,} images",
        f"{source.name}; {config.image_size} × {config.image_size} pixels; {crop}; {flip}; "
        f"{augment}",
        f"{labels}; seed {config.seed}",
    ]
    if shown.bad:
        names = ", ".join(f"{bad.name} ({bad.reason})" for bad in shown.bad)
        title.append(f"replaced by others, for they cannot be used: {names}")
    return title


def denormalize(images: Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Returns the grey levels 0 to 255 nearest to what the model takes in [-1, 1]."""
    return np.rint((images + 1.0) * 127.5).astype(np.uint8)


def _caption(
    shown: TrainBatchView, row: int, class_names: Sequence[str], letters: int
) -> list[str]:
    """Returns the classes of an image with their targets, in lines of at most `letters`."""
    labels = dict.fromkeys((int(shown.labels[row]), int(shown.partner_labels[row])))
    shares = [f" {shown.targets[row, label]:.2f}" for label in labels]
    if shares == [" 1.00"]:
        shares = [""]
    names = [class_names[label] for label in labels]
    line = " + ".join(name + share for name, share in zip(names, shares, strict=True))
    if len(line) <= letters:
        return [line]
    lines = []
    for plus, name, share in zip(("", "+ "), names, shares, strict=False):
        room = letters - len(plus + share)
        lines.append(plus + (name if len(name) <= room else f"{name[: room - 1]}…") + share)
    return lines
