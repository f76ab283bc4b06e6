"""Reads and writes parameters in the layouts that weights are published in.

Parameters have the names of the authors' code, with those of all blocks stacked on a leading axis.
Every tensor of a published layout is a part of one parameter, with its axes in another order: a
view, which a file is read into or written from.
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
from mixer_jax.model.variants import Widths, parameter_shapes

# Parameters under this path have a leading axis of blocks.
_BLOCKS = "blocks/"


class TensorMapping(NamedTuple):
    """One tensor of a layout, or one per block.

    Attributes:
        name: Name of the tensor; {} stands for the index of its block.
        path: Slash-separated path of the parameter.
        axes: Order of the parameter's axes in the tensor; None: the same.
    """

    name: str
    path: str
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Names and axes of published weights.

    Attributes:
        name: Name for people.
        tensors: All tensors; those of the head may be absent.
        signature_keys: Names of tensors that distinguish it from other layouts.
        gelu: GELU that these weights are used with.
        eval_crop: Evaluation crop that these weights are used with.
    """

    name: str
    tensors: tuple[TensorMapping, ...]
    signature_keys: tuple[str, ...]
    gelu: str
    eval_crop: str


def _google() -> Iterator[TensorMapping]:
    for leaf in ("stem", "pre_head_layer_norm", "head"):
        for kind in ("scale" if "norm" in leaf else "kernel", "bias"):
            yield TensorMapping(f"{leaf}/{kind}", f"{leaf}/{kind}")
    for path in parameter_shapes(Widths(1, 1, 1, 1, 1), 1, 0):
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
    """Weights read from a file.

    Attributes:
        params: Float32 parameters.
        config: Architecture config.
        num_tokens: Number of tokens that the weights are for.
        num_classes: Outputs of the head; 0 means no head.
        layout: Layout of the file.
    """

    params: tree.Tree
    config: Widths
    num_tokens: int
    num_classes: int
    layout: WeightLayout


def read_pretrained(file: TensorFile) -> LoadedWeights:
    """Reads published weights.

    The architecture is inferred from the names and shapes of the tensors. All of them are checked
    before any tensor is read.

    Raises:
        UserError: A tensor is missing, unexpected, damaged or not finite, or has a shape that
            contradicts the others.
    """
    for name, shape in file.shapes.items():
        if any(length < 1 for length in shape):
            raise file.error(name, f"must not be empty, got shape {shape}.")
    layout = find_layout(file)
    config, num_tokens, num_classes = infer_config(file, layout)
    shapes = parameter_shapes(config, num_tokens, num_classes)
    _check_names_and_shapes(file, shapes, layout)
    flat = {path: tree.empty_aligned(shape) for path, shape in shapes.items()}
    views = dict(layout_views(flat, layout))

    def read(name: str) -> None:
        view = views[name]
        # A sum is cheap, and not finite if a number is not. Sums of large numbers can overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            file.read(name, view)
            is_suspicious = not math.isfinite(view.sum())
        if is_suspicious and not np.isfinite(view).all():
            raise file.error(name, "must be finite as float32.")

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # The largest first, so that threads finish at about the same time.
        names = sorted(views, key=lambda name: views[name].size, reverse=True)
        for _ in pool.map(read, names):
            pass
    return LoadedWeights(tree.unflatten(flat), config, num_tokens, num_classes, layout)


def layout_views(
    flat: dict[str, np.ndarray], layout: WeightLayout
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a layout by name, as views of parameters.

    Args:
        flat: Parameters by path.
        layout: Layout of the tensors.
    """
    for name, path, axes in layout.tensors:
        if path not in flat:
            continue
        parts = flat[path] if path.startswith(_BLOCKS) else [flat[path]]
        for index, part in enumerate(parts):
            yield name.format(index), part if axes is None else part.transpose(axes)


def layout_shapes(
    shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the shapes of a layout's tensors by name, as `layout_views` does the tensors.

    Args:
        shapes: Shapes of parameters by path.
        layout: Layout of the tensors.
    """
    for name, path, axes in layout.tensors:
        if path not in shapes:
            continue
        shape, num_parts = shapes[path], 1
        if path.startswith(_BLOCKS):
            num_parts, *rest = shape
            shape = tuple(rest)
        for index in range(num_parts):
            yield name.format(index), shape if axes is None else tuple(shape[a] for a in axes)


def find_layout(file: TensorFile) -> WeightLayout:
    """Finds the layout of a file by the names of its tensors.

    Raises:
        UserError: The layout is unknown.
    """
    for layout in LAYOUTS:
        if any(key in file.shapes for key in layout.signature_keys):
            return layout
    expected = ", ".join(repr(key) for layout in LAYOUTS for key in layout.signature_keys)
    found = ", ".join(repr(name) for name in list(file.shapes)[:3]) or "no tensor"
    raise UserError(
        f"{file.path} is not a Mixer checkpoint: expected one of {expected}, got {found}."
    )


def infer_config(file: TensorFile, layout: WeightLayout) -> tuple[Widths, int, int]:
    """Infers architecture config, number of tokens and number of classes of a file.

    Raises:
        UserError: A tensor needed for that is missing or has a wrong number of axes.
    """
    block = next(t for t in layout.tensors if t.path == "blocks/LayerNorm_0/scale")
    pattern = re.compile(re.escape(block.name).replace(r"\{\}", "([0-9]{1,9})"))
    indices = {int(match[1]) for name in file.shapes if (match := pattern.fullmatch(name))}
    num_blocks = next(index for index in itertools.count() if index not in indices)
    if num_blocks < len(indices) or not indices:
        raise file.error(block.name.format(num_blocks), "is missing.")

    def shape(path: str) -> tuple[int, ...]:
        """Returns the shape of a parameter, without the leading axis of blocks."""
        tensor = next(tensor for tensor in layout.tensors if tensor.path == path)
        name = tensor.name.format(0)
        if name not in file.shapes:
            raise file.error(name, "is missing.")
        lengths = file.shapes[name]
        num_axes = 4 if path == "stem/kernel" else 2
        if len(lengths) > num_axes:
            lengths = tuple(length for length in lengths if length != 1)
        if len(lengths) != num_axes:
            raise file.error(name, f"must have {num_axes} axes, got shape {file.shapes[name]}.")
        axes = tensor.axes or tuple(range(num_axes))
        return tuple(lengths[axes.index(axis)] for axis in range(num_axes))

    patch_size, _, _, hidden_dim = shape("stem/kernel")
    num_tokens, tokens_mlp_dim = shape("blocks/token_mixing/Dense_0/kernel")
    _, channels_mlp_dim = shape("blocks/channel_mixing/Dense_0/kernel")
    head = [tensor.name for tensor in layout.tensors if tensor.path.startswith("head/")]
    has_head = any(name in file.shapes for name in head)
    num_classes = shape("head/kernel")[1] if has_head else 0
    config = Widths(num_blocks, patch_size, hidden_dim, tokens_mlp_dim, channels_mlp_dim)
    return config, num_tokens, num_classes


def _check_names_and_shapes(
    file: TensorFile, shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> None:
    expected = dict(layout_shapes(shapes, layout))
    for name, shape in expected.items():
        if name not in file.shapes:
            raise file.error(name, "is missing.")
        # Files with older names have additional axes of length 1.
        found, wanted = ([n for n in lengths if n != 1] for lengths in (file.shapes[name], shape))
        if found != wanted:
            raise file.error(
                name, f"must have shape {shape} to match the others, got {file.shapes[name]}."
            )
    unexpected = sorted(file.shapes.keys() - expected.keys())
    if unexpected:
        raise file.error(unexpected[0], f"is not part of the {layout.name} layout.")
