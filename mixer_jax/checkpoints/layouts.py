"""The layouts that Mixer weights are published in, to and from our parameters.

Our parameters have the authors' names, and the blocks' lie stacked on a leading axis. Every tensor
of a published layout is a part of one of our arrays, with its axes in another order: a view, which
a file is read into or written from.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.formats.base import TensorFile
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig, param_shapes

# Our arrays under this path have a leading axis of blocks.
_BLOCKS = "blocks/"


class TensorMapping(NamedTuple):
    """One tensor of a layout, or one of every block.

    Attributes:
        name: of the tensor; {} stands for the number of its block.
        path: of our array.
        axes: their order in the tensor; None: ours.
    """

    name: str
    path: str
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Names and axes of published weights.

    Attributes:
        name: for people.
        entries: all its tensors; those of the head may be absent.
        marks: names of tensors that tell it from the others.
        gelu: that these weights are used with.
        eval_crop: likewise.
    """

    name: str
    entries: tuple[TensorMapping, ...]
    marks: tuple[str, ...]
    gelu: str
    eval_crop: str


def _google() -> Iterator[TensorMapping]:
    for leaf in ("stem", "pre_head_layer_norm", "head"):
        for kind in ("scale" if "norm" in leaf else "kernel", "bias"):
            yield TensorMapping(f"{leaf}/{kind}", f"{leaf}/{kind}")
    for path in param_shapes(MixerConfig(1, 1, 1, 1, 1), 1, 0):
        if path.startswith(_BLOCKS):
            yield TensorMapping(path.replace(_BLOCKS, "MixerBlock_{}/"), path)


def _google_legacy() -> Iterator[TensorMapping]:
    for name, leaf in (
        ("embedding", "stem"),
        ("Mixer/encoder_norm", "pre_head_layer_norm"),
        ("head", "head"),
    ):
        for kind in ("scale" if "norm" in leaf else "kernel", "bias"):
            yield TensorMapping(f"{name}/{kind}", f"{leaf}/{kind}")
    block = "Mixer/encoderblock_{}"
    for number, mixing in enumerate(("token_mixing", "channel_mixing")):
        for kind in ("scale", "bias"):
            norm = f"LayerNorm_{number}/{kind}"
            yield TensorMapping(f"{block}/{norm}", f"blocks/{norm}")
            if kind == "scale":
                kind = "kernel"
            for dense in (0, 1):
                name = f"{block}/{mixing}_phase_0/{kind}{dense + 1}"
                yield TensorMapping(name, f"blocks/{mixing}/Dense_{dense}/{kind}")


def _timm() -> Iterator[TensorMapping]:
    yield TensorMapping("stem.proj.weight", "stem/kernel", (3, 2, 0, 1))
    yield TensorMapping("stem.proj.bias", "stem/bias")
    for number, mixing in enumerate(("token_mixing", "channel_mixing")):
        block = "blocks.{}"
        yield TensorMapping(f"{block}.norm{number + 1}.weight", f"blocks/LayerNorm_{number}/scale")
        yield TensorMapping(f"{block}.norm{number + 1}.bias", f"blocks/LayerNorm_{number}/bias")
        for dense in (0, 1):
            name = f"{block}.mlp_{mixing.removesuffix('_mixing')}s.fc{dense + 1}"
            yield TensorMapping(f"{name}.weight", f"blocks/{mixing}/Dense_{dense}/kernel", (1, 0))
            yield TensorMapping(f"{name}.bias", f"blocks/{mixing}/Dense_{dense}/bias")
    yield TensorMapping("norm.weight", "pre_head_layer_norm/scale")
    yield TensorMapping("norm.bias", "pre_head_layer_norm/bias")
    yield TensorMapping("head.weight", "head/kernel", (1, 0))
    yield TensorMapping("head.bias", "head/bias")


GOOGLE = WeightLayout("Google", tuple(_google()), ("stem/kernel",), "tanh", "shorter_side")
# Its tensors have axes of length 1 in places, which are left out.
GOOGLE_LEGACY = WeightLayout(
    "Google, older names", tuple(_google_legacy()), ("embedding/kernel",), "tanh", "shorter_side"
)
TIMM = WeightLayout("timm", tuple(_timm()), ("stem.proj.weight",), "exact", "bicubic")
LAYOUTS = (GOOGLE, GOOGLE_LEGACY, TIMM)


class LoadedWeights(NamedTuple):
    """Published weights.

    Attributes:
        params: our tree of them, float32.
        config: of the model they are for.
        num_tokens: likewise.
        num_classes: likewise; 0: there is no head.
        layout: that they came in.
    """

    params: tree.Tree
    config: MixerConfig
    num_tokens: int
    num_classes: int
    layout: WeightLayout


def read_pretrained(file: TensorFile) -> LoadedWeights:
    """Reads published weights.

    Everything is told from the names and shapes of the tensors, and checked, before any is read.

    Raises:
        UserError: a tensor is missing, too many, of another shape than the rest tells, damaged, or
            not finite.
    """
    for name, shape in file.shapes.items():
        if any(length < 1 for length in shape):
            raise file.error(name, f"has shape {shape}, and so no numbers")
    layout = find_layout(file)
    config, num_tokens, num_classes = infer_config(file, layout)
    shapes = param_shapes(config, num_tokens, num_classes)
    _check_names_and_shapes(file, shapes, layout)
    flat = tree.empty_aligned(shapes)
    views = dict(layout_views(flat, layout))

    def read(name: str) -> None:
        view = views[name]
        # Numbers may be too large for float32. A sum is cheap, and not finite if a number is not;
        # of large numbers it may not be either.
        with np.errstate(over="ignore", invalid="ignore"):
            file.read(name, view)
            suspicious = not math.isfinite(view.sum())
        if suspicious and not np.isfinite(view).all():
            raise file.error(name, "has numbers that are not finite")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # The largest first, so that no thread is left with one when the others are done.
        names = sorted(views, key=lambda name: views[name].size, reverse=True)
        for _ in pool.map(read, names):
            pass
    return LoadedWeights(tree.unflatten(flat), config, num_tokens, num_classes, layout)


def layout_views(
    flat: dict[str, np.ndarray], layout: WeightLayout
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of a layout by name, as a view of our arrays.

    Args:
        flat: our arrays by path.
        layout: to yield the tensors of.
    """
    for name, path, axes in layout.entries:
        if path not in flat:
            continue
        parts = flat[path] if path.startswith(_BLOCKS) else [flat[path]]
        for number, part in enumerate(parts):
            yield name.format(number), part if axes is None else part.transpose(axes)


def layout_shapes(
    shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the shape of every tensor of a layout by name, as `layout_views` has them.

    Args:
        shapes: of our arrays by path.
        layout: to yield the tensors of.
    """
    for name, path, axes in layout.entries:
        if path not in shapes:
            continue
        shape, count = shapes[path], 1
        if path.startswith(_BLOCKS):
            count, *rest = shape
            shape = tuple(rest)
        for number in range(count):
            yield name.format(number), shape if axes is None else tuple(shape[a] for a in axes)


def find_layout(file: TensorFile) -> WeightLayout:
    """Returns the layout that the tensors of a file have.

    Raises:
        UserError: it has none of the known ones.
    """
    for layout in LAYOUTS:
        if any(mark in file.shapes for mark in layout.marks):
            return layout
    some = ", ".join(repr(name) for name in list(file.shapes)[:3]) or "no tensor"
    marks = ", ".join(repr(mark) for layout in LAYOUTS for mark in layout.marks)
    raise UserError(f"{file.path} is no Mixer: it has {some}, and none of {marks}")


def infer_config(file: TensorFile, layout: WeightLayout) -> tuple[MixerConfig, int, int]:
    """Returns config, number of tokens and number of classes that a file's tensors tell.

    Raises:
        UserError: a tensor that tells them is missing, or has another number of axes.
    """
    block = layout.entries[[e.path for e in layout.entries].index("blocks/LayerNorm_0/scale")]
    pattern = re.compile(re.escape(block.name).replace(r"\{\}", "([0-9]{1,9})"))
    numbers = {int(match[1]) for name in file.shapes if (match := pattern.fullmatch(name))}
    num_blocks = next(number for number in itertools.count() if number not in numbers)
    if num_blocks < len(numbers) or not numbers:
        raise file.error(block.name.format(num_blocks), "is missing")

    def shape(path: str) -> tuple[int, ...]:
        """Returns the shape of our array, or of its first block's part."""
        entry = next(entry for entry in layout.entries if entry.path == path)
        name = entry.name.format(0)
        if name not in file.shapes:
            raise file.error(name, "is missing")
        found = file.shapes[name]
        wanted = 4 if path == "stem/kernel" else 2
        if len(found) > wanted:
            found = tuple(length for length in found if length != 1)
        if len(found) != wanted:
            raise file.error(name, f"has shape {file.shapes[name]}, not {wanted} axes")
        axes = entry.axes or tuple(range(wanted))
        return tuple(found[axes.index(axis)] for axis in range(wanted))

    patch_size, _, _, hidden_dim = shape("stem/kernel")
    num_tokens, tokens_mlp_dim = shape("blocks/token_mixing/Dense_0/kernel")
    _, channels_mlp_dim = shape("blocks/channel_mixing/Dense_0/kernel")
    head = [entry.name for entry in layout.entries if entry.path.startswith("head/")]
    has_head = any(name in file.shapes for name in head)
    num_classes = shape("head/kernel")[1] if has_head else 0
    config = MixerConfig(num_blocks, patch_size, hidden_dim, tokens_mlp_dim, channels_mlp_dim)
    return config, num_tokens, num_classes


def _check_names_and_shapes(
    file: TensorFile, shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> None:
    expected = dict(layout_shapes(shapes, layout))
    for name, shape in expected.items():
        if name not in file.shapes:
            raise file.error(name, "is missing")
        # Axes of length 1 say nothing, and older files have more of them.
        found, wanted = ([n for n in lengths if n != 1] for lengths in (file.shapes[name], shape))
        if found != wanted:
            raise file.error(
                name, f"has shape {file.shapes[name]}; the other tensors make it {shape}"
            )
    extra = sorted(file.shapes.keys() - expected.keys())
    if extra:
        raise file.error(extra[0], "is none of a Mixer's")
