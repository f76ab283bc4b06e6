"""Plot of saliency: images next to a map of what the prediction for them depends on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixer_jax.data.wordnet import label_class
from mixer_jax.errors import UserError
from mixer_jax.evaluation.saliency import Saliency
from mixer_jax.visualization.figures import DPI, make_figure

# More images than this do not fit on a screen.
MAX_IMAGES = 24
# Sizes in inches, and characters per inch.
_MIN_CELL_SIZE, _TITLE_CHARS = 2.2, 9
# Columns of the figure, each an image and its overlay.
_COLUMNS = 2
# The gray level of black pixels under the overlay, which would hide dark colors.
_BLACK = 0.5
_LABELS = {"occlusion": "drop of log-odds", "gradient": "|gradient of log-odds|"}


def plot_saliency(saliencies: Saliency | Sequence[Saliency]) -> Any:
    """Plots images as the model sees them, with their saliency, as a figure of Matplotlib.

    The color scale of occlusion is symmetric about zero: red pixels speak for the class, blue ones
    against it.

    Args:
        saliencies: Results of `Classifier.saliency`.

    Raises:
        UserError: There are too many images, or none.
    """
    from matplotlib.cm import ScalarMappable

    rows = [saliencies] if isinstance(saliencies, Saliency) else list(saliencies)
    check_num_images(len(rows))
    height, width = rows[0].values.shape
    # Large enough to show every pixel.
    cell_width = max(_MIN_CELL_SIZE, width / DPI)
    cell_height = cell_width * height / width + 0.55
    columns = min(_COLUMNS, len(rows))
    num_rows = math.ceil(len(rows) / columns)
    figure = make_figure(columns * (2 * cell_width + 1.1), num_rows * cell_height, constrained=True)
    grid = figure.subplots(num_rows, 2 * columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for saliency, left, right in zip(rows, grid[::2], grid[1::2], strict=False):
        left.imshow(saliency.pixels, interpolation="nearest")
        _set_title(left, saliency.image, cell_width)
        gray = _BLACK + (1 - _BLACK) * saliency.pixels.mean(-1) / 255
        right.imshow(gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        limit = float(np.abs(saliency.values).max()) or 1.0
        is_signed = saliency.method == "occlusion"
        overlay = right.imshow(
            saliency.values,
            cmap="RdBu_r" if is_signed else "Reds",
            vmin=-limit if is_signed else 0.0,
            vmax=limit,
            # Small values, which are almost white, are transparent instead.
            alpha=np.abs(saliency.values) / limit,
            interpolation="nearest",
        )
        _set_title(right, f"{label_class(saliency.name)}: {saliency.probability:.1%}", cell_width)
        colors = ScalarMappable(overlay.norm, overlay.cmap)
        figure.colorbar(colors, ax=right, label=_LABELS[saliency.method], fraction=0.05)
    return figure


def check_num_images(num_images: int) -> None:
    """Raises UserError if a figure cannot show this number of images."""
    if not 1 <= num_images <= MAX_IMAGES:
        raise UserError(f"number of images must be between 1 and {MAX_IMAGES}, got {num_images}.")


def describe_saliency(saliency: Saliency) -> str:
    """Formats the class, its probability, and the largest value with its row and column."""
    row, column = np.unravel_index(saliency.values.argmax(), saliency.values.shape)
    return (
        f"{saliency.image}: {label_class(saliency.name)} {saliency.probability:.2%}, largest "
        f"{_LABELS[saliency.method]} {saliency.values.max():.3g} at row {row}, column {column}"
    )


def _set_title(axes: Any, text: str, width: float) -> None:
    """Sets a title that fits above an image, without its beginning if it is too long."""
    max_chars = int(width * _TITLE_CHARS)
    text = text if len(text) <= max_chars else f"…{text[1 - max_chars :]}"
    axes.set_title(text, fontsize="small", parse_math=False)
