"""Plot of a training batch: its images and labels as the model sees them."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from mixer_jax.config.schema import RecipeConfig, RunConfig
from mixer_jax.data.readers import BadImage, TrainReader
from mixer_jax.data.source import Source
from mixer_jax.data.wordnet import label_class
from mixer_jax.training.loss import make_targets
from mixer_jax.training.mixup import apply_mixup, sample_mixup
from mixer_jax.training.setup import train_preprocess_args
from mixer_jax.training.step import step_rngs
from mixer_jax.visualization.figures import DPI, make_figure

# Sizes in inches, and characters per inch.
_MIN_CELL_SIZE, _LABEL_HEIGHT, _LINE_HEIGHT = 1.8, 0.5, 0.2
_MIN_WIDTH = 9.6
# Fraction of a cell's width that its image fills.
_IMAGE_FRACTION = 0.88
_TITLE_CHARS, _LABEL_CHARS = 12, 11


class TrainBatchView(NamedTuple):
    """First images of a training batch, after crop, augmentation, and mixup or CutMix.

    Attributes:
        images: Inputs of the model, in [-1, 1].
        targets: Targets of the loss.
        labels: Classes of the images, multi-hot if they may have any number of labels.
        partner_labels: Classes of the images mixed into them; without any, equal to `labels`.
        weight: Weight of each label against that of its partner; 1 without mixup and CutMix.
        is_cutmix: Whether the partners fill a box (CutMix) or all pixels (mixup).
        bad: Bad images, which other images replace.
    """

    images: Float32[np.ndarray, "n s s 3"]
    targets: Float32[np.ndarray, "n classes"]
    labels: Int32[np.ndarray, " n"] | Bool[np.ndarray, "n classes"]
    partner_labels: Int32[np.ndarray, " n"] | Bool[np.ndarray, "n classes"]
    weight: float
    is_cutmix: bool
    bad: list[BadImage]


def load_train_batch(
    config: RunConfig, source: Source, step: int, num_images: int
) -> TrainBatchView:
    """Loads the first images of the batch of `step`, and no others, as the run would."""
    recipe = config.recipe
    has_partners = recipe.mixup > 0 or recipe.cutmix > 0
    # The partner of an image is the one before it, and that of the first image is the last of the
    # batch. With that one in front, rolling these few by one pairs them as rolling the batch does.
    rows = np.arange(-1 if has_partners else 0, num_images) % config.batch_size
    preprocess = train_preprocess_args(config.preprocess)
    reader = TrainReader(source, config.seed, config.image_size, preprocess)
    arrays, bad = reader(step * config.batch_size + rows)

    def finish(images: jax.Array, labels: jax.Array) -> Any:
        targets = make_targets(labels, source.num_classes, recipe)
        mixup_rng, _ = step_rngs(config.seed, step)
        pairs, weights = sample_mixup(mixup_rng, images, targets, recipe)
        return *apply_mixup(pairs, weights), weights

    # Compiled, like the training step, so that the compiler rounds in the same way.
    images, targets, weights = jax.jit(finish)(arrays["image"], arrays["label"])
    labels = arrays["label"]
    partner_labels = np.roll(labels, 1, axis=0) if has_partners else labels
    # A weight of mixup is never 0.
    pixels = weights and weights.pixels
    has_box = pixels is not None and bool((pixels == 0).any())
    first = len(rows) - num_images
    return TrainBatchView(
        np.asarray(images)[first:],
        np.asarray(targets)[first:],
        labels[first:],
        partner_labels[first:],
        float(weights.target) if weights else 1.0,
        has_box or (recipe.cutmix > 0 and not recipe.mixup),
        bad,
    )


def draw_train_batch(view: TrainBatchView, class_names: Sequence[str], title: Sequence[str]) -> Any:
    """Draws images in a grid, each above its labels and their targets.

    Args:
        view: Images from `load_train_batch`.
        class_names: Name of each class.
        title: Paragraphs above the images, from `format_caption`.
    """
    count, size = view.images.shape[:2]
    # Large enough to show every pixel.
    cell_size = max(_MIN_CELL_SIZE, size / DPI / _IMAGE_FRACTION)
    columns = math.ceil(math.sqrt(2 * count))
    rows = math.ceil(count / columns)
    width = max(columns * cell_size, _MIN_WIDTH)
    lines = [line for text in title for line in textwrap.wrap(text, int(width * _TITLE_CHARS))]
    title_height = (len(lines) + 2) * _LINE_HEIGHT
    height = rows * (cell_size + _LABEL_HEIGHT) + title_height

    figure = make_figure(width, height)
    # A dollar sign in the name of a class does not start a formula.
    figure.suptitle(
        "\n".join(lines),
        x=0.01,
        y=1 - _LINE_HEIGHT / height,
        ha="left",
        va="top",
        fontsize="medium",
        parse_math=False,
    )
    figure.subplots_adjust(0.01, _LABEL_HEIGHT / height, 0.99, 1 - title_height / height, 0.1, 0.3)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for row, (axes, pixels) in enumerate(zip(grid, denormalize(view.images), strict=False)):
        axes.imshow(pixels, interpolation="none")
        axes.set_axis_off()
        label = format_label(view, row, class_names, int(cell_size * _LABEL_CHARS))
        axes.set_title(
            label, y=0, pad=-4, va="top", fontsize="small", family="monospace", parse_math=False
        )
    for axes in grid[count:]:
        axes.remove()
    return figure


def format_caption(
    name: str, config: RunConfig, source: Source, step: int, view: TrainBatchView
) -> list[str]:
    """Formats the title: which images are shown, and how images and labels were made.

    Args:
        name: Name of the config.
        config: Config of the run.
        source: Training data of the run.
        step: Index of the batch, from 0.
        view: Images from `load_train_batch`.
    """
    preprocess, recipe = config.preprocess, config.recipe
    resized_crop = "random crops of 7/8 of each side"
    if preprocess.resize_size:
        resized_crop = f"random crops of {config.image_size} of {preprocess.resize_size} pixels"
    crop = {
        "inception": f"Inception crops of at least {preprocess.min_area:.0%} of the image",
        "random_resized_crop": f"timm's crops of at least {preprocess.min_area:.0%} of the image",
        "random_crop": resized_crop,
        "bilinear_crop": resized_crop,
        "random_shift": f"whole images, shifted by up to {preprocess.max_shift} pixels",
        "resize": "whole images",
    }[preprocess.train_crop]
    flip = "half of them flipped" if preprocess.flip else "none of them flipped"
    augment = "no RandAugment"
    if preprocess.randaugment_layers:
        augment = (
            f"RandAugment with {preprocess.randaugment_layers} layers of magnitude "
            f"{preprocess.randaugment_magnitude:g}"
        )
    if preprocess.random_erasing:
        fill = {"constant": "gray", "random": "a random color", "pixel": "random pixels"}
        augment += (
            f"; random erasing of {preprocess.random_erasing:.0%} of the images with "
            f"{fill[preprocess.random_erasing_mode]}"
        )
    permutation = {
        "none": "",
        "patches": f"patches of {preprocess.permute_patch_size} pixels permuted; ",
        "pixels": "all pixels permuted; ",
    }[preprocess.permute]
    labels = _describe_mixup(recipe, view)
    if recipe.label_smoothing:
        labels += f"; label smoothing {recipe.label_smoothing:g}"
    if recipe.min_target:
        labels += f"; targets of at least {recipe.min_target:g}"
    size = config.image_size
    title = [
        f"{name}, step {step:,}: {len(view.images):,} of {config.batch_size:,} images",
        f"{source.name}; {size} × {size} pixels; {crop}; {flip}; {augment}",
        f"{permutation}{labels}; seed {config.seed}",
    ]
    if view.bad:
        names = ", ".join(f"{bad.name} ({bad.reason})" for bad in view.bad)
        title.append(f"bad images, replaced by others: {names}")
    return title


def _describe_mixup(recipe: RecipeConfig, view: TrainBatchView) -> str:
    names = {"mixup": recipe.mixup, "CutMix": recipe.cutmix}
    text = " or ".join(f"{name} {alpha:g}" for name, alpha in names.items() if alpha)
    if not text:
        return "no mixup"
    if recipe.mixup and recipe.cutmix:
        text += f" with probability {recipe.mixup_switch_prob:g}, here "
        text += "CutMix" if view.is_cutmix else "mixup"
    text += f": {view.weight:.3f} of each image and "
    if view.is_cutmix:
        return text + f"a box with {1 - view.weight:.3f} of the image before it"
    return text + f"{1 - view.weight:.3f} of the image before it"


def denormalize(images: Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Converts inputs of the model in [-1, 1] to the nearest pixel values."""
    return np.rint((images + 1.0) * 127.5).astype(np.uint8)


def format_label(view: TrainBatchView, row: int, class_names: Sequence[str], max_chars: int) -> str:
    """Formats the classes of one image and their targets, one line per class.

    Multi-hot labels have one line per image instead, with all of its classes, and its weight.

    Args:
        view: Images from `load_train_batch`.
        row: Index of the image.
        class_names: Name of each class.
        max_chars: Length to which lines are shortened.
    """
    pair = view.labels[row], view.partner_labels[row]
    if view.labels.ndim == 2:
        members = [[class_names[k] for k in np.flatnonzero(labels).tolist()] for labels in pair]
        names = [", ".join(map(label_class, found)) or "no label" for found in members]
        targets = [f" {view.weight:.2f}", f" {1 - view.weight:.2f}"]
        if view.weight == 1:
            names, targets = names[:1], [""]
    else:
        labels = list(dict.fromkeys(map(int, pair)))
        names = [label_class(class_names[label]) for label in labels]
        targets = [f" {view.targets[row, label]:.2f}" for label in labels]
        if targets == [" 1.00"]:
            targets = [""]
    lines = []
    for prefix, name, target in zip(("", "+ "), names, targets, strict=False):
        room = max_chars - len(prefix + target)
        lines.append(prefix + (name if len(name) <= room else f"{name[: room - 1]}…") + target)
    return "\n".join(lines)
