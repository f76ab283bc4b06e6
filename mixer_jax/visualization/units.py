"""Plots of weights over the image: units of token mixing, and filters of the first layer.

Units are drawn as in Figures 5 and 6 of the MLP-Mixer paper (arXiv 2105.01601), and filters as in
its Figure 7.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier
from mixer_jax.models.registry import get_family
from mixer_jax.visualization.figures import DPI, make_figure

# Sizes in pixels: margins of the figure, a line of text, gaps between maps, and the color bar.
_MARGIN, _LINE, _GAP, _COLOR_BAR = 24, 22, 1, 150
# Widths of a panel that fits several on a screen, and of a single one.
_PANEL_WIDTH, _SINGLE_WIDTH = 640, 960
_MAX_ZOOM = 16
# The largest figure, in pixels: it takes about a gigabyte to render.
_MAX_PIXELS = 40_000_000
# Weights of larger magnitude than this fraction of all have the last color.
_COLOR_QUANTILE = 0.995


class SortedUnits(NamedTuple):
    """Hidden units of one block, by frequency and, within it, in pairs.

    Attributes:
        indices: Indices of the hidden units in the order of drawing. Units 2i and 2i + 1 are a
            pair; if their number is odd, the last one is alone.
        maps: Weights of the units in this order.
        frequencies: Frequency of each unit in this order, in cycles per patch; see
            `spectral_centroids`.
        similarities: Cosine similarity of the two units of each pair, -1 for opposite phases.
    """

    indices: Int[np.ndarray, " units"]
    maps: Float[np.ndarray, "units rows columns"]
    frequencies: Float[np.ndarray, " units"]
    similarities: Float[np.ndarray, " pairs"]


def spectral_centroids(
    maps: Float[np.ndarray, "maps rows columns *channels"],
) -> Float[np.ndarray, " maps"]:
    """Computes the mean frequency of maps, weighted by their power spectrum.

    The frequency is that of a two-dimensional wave, in cycles per row or column: 0 for a constant
    map, at most √½. Powers of the channels are added.
    """
    rows, columns = maps.shape[1:3]
    power = np.square(np.abs(np.fft.fft2(maps.astype(np.float64), axes=(1, 2))))
    power = power.reshape(len(maps), rows * columns, -1).sum(-1)
    total = power.sum(-1)
    return power @ _frequencies(rows, columns) / np.where(total, total, 1.0)


def noise_frequency(rows: int, columns: int) -> float:
    """Computes the expected spectral centroid of independent weights of equal variance."""
    return float(_frequencies(rows, columns).mean())


def _frequencies(rows: int, columns: int) -> Float[np.ndarray, " bins"]:
    return np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)).ravel()


def sort_units(maps: Float[np.ndarray, "units rows columns"]) -> SortedUnits:
    """Pairs units of opposite phase and sorts the pairs by frequency, low ones first.

    Of the units that are not paired yet, the two with the smallest cosine similarity are a pair.
    The frequency of a pair is the mean of both.
    """
    pairs, similarities = _pair_opposites(maps.reshape(len(maps), -1))
    frequencies = spectral_centroids(maps)
    order = np.argsort(frequencies[pairs].mean(-1), kind="stable")
    indices = pairs[order].ravel()
    if len(maps) % 2:
        indices = np.append(indices, np.setdiff1d(np.arange(len(maps)), indices))
    return SortedUnits(indices, maps[indices], frequencies[indices], similarities[order])


def _pair_opposites(
    vectors: Float[np.ndarray, "units weights"],
) -> tuple[Int[np.ndarray, "pairs 2"], Float[np.ndarray, " pairs"]]:
    """Pairs vectors greedily by the smallest cosine similarity."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit_vectors = vectors / np.where(norms, norms, 1.0)
    similarity = unit_vectors @ unit_vectors.T
    first, second = np.triu_indices(len(vectors), k=1)
    candidates = np.argsort(similarity[first, second], kind="stable")
    is_free = [True] * len(vectors)
    pairs = []
    for one, other in zip(first[candidates].tolist(), second[candidates].tolist(), strict=True):
        if is_free[one] and is_free[other]:
            is_free[one] = is_free[other] = False
            pairs.append((one, other))
    matched = np.array(pairs, np.int64).reshape(-1, 2)
    return matched, similarity[matched[:, 0], matched[:, 1]]


def sort_filters(
    filters: Float[np.ndarray, "height width 3 filters"],
) -> Float[np.ndarray, "filters height width 3"]:
    """Sorts filters by frequency, low ones first; see `spectral_centroids`."""
    maps = np.moveaxis(filters, -1, 0)
    return maps[np.argsort(spectral_centroids(maps), kind="stable")]


def read_units(
    model: Classifier | PretrainedWeights,
) -> Float[np.ndarray, "blocks units rows columns"]:
    """Reads the input weights of the hidden units of token mixing, over the grid of patches.

    Raises:
        UserError: The model has no MLPs that mix tokens.
    """
    info = model.model_info
    family = get_family(info.family)
    units = family.token_mixing_units(model.params, info.config, info.image_size)
    if units is None:
        raise UserError(
            f"model must have MLPs that mix tokens, got {info.name}. Draw the filters of its first "
            "layer with visualize filters."
        )
    return np.asarray(units)


def plot_units(model: Classifier | PretrainedWeights, block: int | None = 0) -> Any:
    """Plots the hidden units of token mixing over the image, as a figure of Matplotlib.

    Each small picture is one unit, with the weight of every patch of the image at its place. Units
    of opposite phase are next to each other, and pairs are sorted by frequency, low ones first.

    Args:
        model: `Classifier`, or `PretrainedWeights` from `load_checkpoint`.
        block: Index of the block, from 0; None: all blocks.

    Raises:
        UserError: The model has no MLPs that mix tokens, or no such block.
    """
    units = read_units(model)
    blocks = select_blocks("block", block, len(units))
    return draw_units({index: sort_units(units[index]) for index in blocks}, model.model_info)


def plot_filters(model: Classifier | PretrainedWeights, gray: bool = False) -> Any:
    """Plots the filters of the first layer in color, as a figure of Matplotlib.

    Filters are sorted by frequency, low ones first. Each is scaled by its largest weight; gray is
    zero.

    Args:
        model: `Classifier`, or `PretrainedWeights` from `load_checkpoint`.
        gray: Whether to draw the mean over colors, the only part that acts on gray images.

    Raises:
        UserError: The family does not say what the filters of its first layer are.
    """
    return draw_filters(sort_filters(read_filters(model, gray)), model.model_info)


def read_filters(
    model: Classifier | PretrainedWeights, gray: bool = False
) -> Float[np.ndarray, "height width 3 filters"]:
    """Reads the filters of the first layer, as they are applied to pixels.

    Args:
        model: Model or weights.
        gray: Whether to replace the weights of each color by their mean.

    Raises:
        UserError: The family does not say what they are.
    """
    info = model.model_info
    filters = get_family(info.family).stem_filters(model.params)
    if filters is None:
        raise UserError(
            f"model must have a first layer whose filters can be drawn, got {info.name}."
        )
    filters = np.asarray(filters)
    return np.repeat(filters.mean(2, keepdims=True), 3, axis=2) if gray else filters


def select_blocks(name: str, block: int | None, num_blocks: int) -> list[int]:
    """Returns the indices of the requested blocks, all if `block` is None.

    Raises:
        UserError: There is no such block; the message starts with `name`.
    """
    if block is None:
        return list(range(num_blocks))
    if not 0 <= block < num_blocks:
        raise UserError(
            f"{name} must be between 0 and {num_blocks - 1} in a model of {num_blocks} blocks, "
            f"got {block}."
        )
    return [block]


def describe_units(units: SortedUnits) -> str:
    """Formats the number of units, their mean frequency, and how opposite the pairs are."""
    rows, columns = units.maps.shape[1:]
    text = (
        f"{len(units.maps):,} units, mean frequency {units.frequencies.mean():.3f} per patch "
        f"(noise: {noise_frequency(rows, columns):.3f})"
    )
    if not len(units.similarities):
        return text
    return f"{text}, median similarity of pairs {np.median(units.similarities):.2f}"


def describe_filters(filters: Float[np.ndarray, "filters height width 3"]) -> str:
    """Formats the number of filters, their size and their mean frequency."""
    height, width = filters.shape[1:3]
    return (
        f"{len(filters):,} filters of {height} × {width} px, mean frequency "
        f"{spectral_centroids(filters).mean():.3f} per px "
        f"(noise: {noise_frequency(height, width):.3f})"
    )


def draw_units(units_by_block: dict[int, SortedUnits], info: ModelInfo) -> Any:
    """Draws the sorted units of blocks, one panel per block with its own color scale.

    Raises:
        UserError: The figure would be too large.
    """
    mosaics = {
        block: _tile(units.maps, gap=_GAP, num_paired=2) for block, units in units_by_block.items()
    }
    titles = [f"block {block}: {describe_units(units)}" for block, units in units_by_block.items()]
    heading = f"{info.name}: input weights of token mixing, pairs sorted by frequency"
    panels = _make_panels(list(mosaics.values()), heading + _permutation_note(info), titles)
    for axes, bar, mosaic in zip(panels.axes, panels.bars, mosaics.values(), strict=True):
        limit = float(np.nanquantile(np.abs(mosaic), _COLOR_QUANTILE)) or 1.0
        image = axes.imshow(
            mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto"
        )
        panels.figure.colorbar(image, cax=bar, extend="both", label="weight")
    return panels.figure


def draw_filters(filters: Float[np.ndarray, "filters height width 3"], info: ModelInfo) -> Any:
    """Draws filters in color.

    Raises:
        UserError: The figure would be too large.
    """
    largest = np.abs(filters).max((1, 2, 3), keepdims=True)
    colors = 0.5 + filters / np.where(largest, 2 * largest, 1.0)
    mosaic = _tile(colors, gap=_GAP, num_paired=1)
    heading = f"{info.name}: filters of the first layer, sorted by frequency"
    title = describe_filters(filters)
    panels = _make_panels([mosaic], heading + _permutation_note(info), [title], color_bar=False)
    # White between the filters.
    panels.axes[0].imshow(np.nan_to_num(mosaic, nan=1.0), interpolation="nearest", aspect="auto")
    return panels.figure


def _permutation_note(info: ModelInfo) -> str:
    return "" if info.permutation is None else f" ({info.permutation.kind} of images are permuted)"


def _tile(
    maps: Float[np.ndarray, "maps rows columns *channels"], *, gap: int, num_paired: int
) -> Float[np.ndarray, "height width *channels"]:
    """Arranges maps in rows of about 3:2, row by row, with NaN between them and in empty cells.

    The gap is three times as wide after each `num_paired` maps of a row, if that is more than one.
    """
    count, height, width = maps.shape[:3]
    group_gap = 3 * gap if num_paired > 1 else gap
    group_width = num_paired * (width + gap) - gap + group_gap
    num_groups = math.ceil(count / num_paired)
    # Groups per row such that the height is two thirds of the width.
    per_row = math.ceil(math.sqrt(1.5 * num_groups * (height + gap) / group_width))
    per_row = min(max(per_row, 1), num_groups)
    num_rows = math.ceil(num_groups / per_row)
    shape = (num_rows * (height + gap) - gap, per_row * group_width - group_gap)
    mosaic = np.full((*shape, *maps.shape[3:]), np.nan, np.float32)
    for index, values in enumerate(maps):
        group, member = divmod(index, num_paired)
        row, column = divmod(group, per_row)
        top, left = row * (height + gap), column * group_width + member * (width + gap)
        mosaic[top : top + height, left : left + width] = values
    return mosaic


class _Panels(NamedTuple):
    figure: Any
    axes: list[Any]
    bars: list[Any]


def _make_panels(
    mosaics: list[np.ndarray], heading: str, titles: list[str], color_bar: bool = True
) -> _Panels:
    """Makes a figure with one panel per mosaic, whose weights are whole numbers of pixels.

    Raises:
        UserError: The figure would be too large.
    """
    height, width = mosaics[0].shape[:2]
    per_row = math.ceil(math.sqrt(len(mosaics)))
    num_rows = math.ceil(len(mosaics) / per_row)
    target = _SINGLE_WIDTH if len(mosaics) == 1 else _PANEL_WIDTH
    zoom = min(max(target // width, 1), _MAX_ZOOM)
    height, width = zoom * height, zoom * width
    # At least the titles, wrapped, fit above a panel.
    cell_width = max(width, _PANEL_WIDTH) + (_COLOR_BAR if color_bar else 0) + _MARGIN
    cell_height = height + 3 * _LINE + _MARGIN
    figure_size = np.array([per_row * cell_width + _MARGIN, num_rows * cell_height + 3 * _LINE])
    if figure_size.prod() > _MAX_PIXELS:
        raise UserError(
            f"figures must have at most {_MAX_PIXELS:,} pixels, got {figure_size.prod():,} for "
            f"{len(mosaics)} blocks. Draw one block at a time."
        )
    figure = make_figure(*(figure_size / DPI))

    def add_axes(left: float, top: float, axes_width: float, axes_height: float) -> Any:
        bottom = figure_size[1] - top - axes_height
        box = np.array([left, bottom, axes_width, axes_height]) / np.tile(figure_size, 2)
        return figure.add_axes(tuple(box))

    figure.text(
        _MARGIN / figure_size[0],
        1 - _LINE / figure_size[1],
        heading,
        va="top",
        fontsize="large",
        parse_math=False,
    )
    axes, bars = [], []
    for index, title in enumerate(titles):
        row, column = divmod(index, per_row)
        left, top = _MARGIN + column * cell_width, 2.5 * _LINE + row * cell_height
        panel = add_axes(left, top + 2 * _LINE, width, height)
        panel.set_axis_off()
        panel.set_title(
            title.replace(", median", ",\nmedian"), loc="left", fontsize="small", parse_math=False
        )
        axes.append(panel)
        if color_bar:
            bar_height = min(height, 240)
            bars.append(add_axes(left + width + _MARGIN, top + 2 * _LINE, 12, bar_height))
    return _Panels(figure, axes, bars)
