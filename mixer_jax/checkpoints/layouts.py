"""Reading and writing of parameters in the layouts that weights are published in.

A file is read into, or written from, views of parameters: every tensor of a layout is a part of one
parameter, with its axes in another order. Model families declare their layouts.
"""

import concurrent.futures
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.checkpoints.formats import SelectedTensors, TensorFile
from mixer_jax.checkpoints.weights import Tree, allocate_zeros, unflatten_params
from mixer_jax.errors import UserError
from mixer_jax.models.family import InferredConfig, ModelFamily, Shape, WeightLayout
from mixer_jax.models.registry import FAMILIES, get_family

# Parameters under this path have a leading axis of blocks.
_BLOCKS = "blocks/"
# What programs put in front of the names of weights, in any combination. The first that occurs
# counts if a file has several weights; averaged weights come before all others.
_AVERAGED = {
    "state_dict_ema/",
    "model_ema/",
    "ema_state_dict/",
    "model_ema_state_dict/",
    "ema_params/",
    "params_ema/",
    "ema/",
    "ema_model.",
    "model_ema.",
    "ema.",
}
_PREFIXES = (
    # In big_vision's checkpoints: with an optimizer of optax or of Flax, and the image tower.
    "params/",
    "opt/target/",
    "img/",
    # Dictionaries in checkpoints of PyTorch.
    *sorted(_AVERAGED),
    "state_dict/",
    "model_state_dict/",
    "model_state/",
    "model/",
    "module/",
    "net/",
    "network/",
    "weights/",
    # Modules that contain the model: of Lightning, DistributedDataParallel and torch.compile.
    "model.",
    "net.",
    "network.",
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
)
_PREFIX_PART = re.compile("|".join(map(re.escape, sorted(_PREFIXES, key=len, reverse=True))))
_PREFIX_PATTERN = re.compile(f"(?:{_PREFIX_PART.pattern})*")
# Wrappers of a single block, inside a name.
_INNER_WRAPPERS = re.compile(
    r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


class LoadedWeights(NamedTuple):
    """Weights read from a file.

    Attributes:
        params: Float32 parameters.
        family: Name of the model family.
        config: Architecture config.
        num_tokens: Number of tokens that the weights are for; 0 if they fit any image size.
        num_classes: Outputs of the head; 0 means no head.
        layout: Layout of the file.
    """

    params: Tree
    family: str
    config: Any
    num_tokens: int
    num_classes: int
    layout: WeightLayout

    @property
    def size_multiple(self) -> int:
        """Divisor of valid heights and widths, in pixels."""
        return get_family(self.family).image_size_multiple(self.config)

    def fits_image_size(self, size: tuple[int, int]) -> bool:
        """Returns whether the weights are for images of this height and width in pixels."""
        num_tokens = math.prod(length // self.size_multiple for length in size)
        is_valid = not any(length % self.size_multiple for length in size)
        return is_valid and self.num_tokens in (0, num_tokens)


def read_pretrained(file: TensorFile) -> LoadedWeights:
    """Reads published weights.

    The architecture is inferred from the names and shapes of the tensors. All of them are checked
    before any tensor is read. Names can have prefixes (`_PREFIXES`); what else a training program
    saved next to the weights is then skipped.

    Raises:
        UserError: A tensor is missing, unexpected, damaged or not finite, or has a shape that
            contradicts the others.
    """
    family, layout, prefix = _find_layout(file)
    file = SelectedTensors(file, _select_names(file, prefix), prefix)
    for name, shape in file.shapes.items():
        if any(length < 1 for length in shape):
            raise file.error(name, f"must not be empty, got shape {shape}.")
    (config, num_tokens), num_classes = _infer_config(file, family, layout)
    # Shapes depend on the number of tokens at most, so any image size with this number does.
    side = family.image_size_multiple(config)
    shapes = family.param_shapes(config, (side, side * max(num_tokens, 1)), num_classes)
    _check_names_and_shapes(file, shapes, layout)
    flat = {path: allocate_zeros(shape) for path, shape in shapes.items()}
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
    params = unflatten_params(flat)
    return LoadedWeights(params, family.name, config, num_tokens, num_classes, layout)


def layout_views(
    flat: dict[str, np.ndarray], layout: WeightLayout
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a layout by name, as views of parameters by path."""
    for name, path, axes in layout.tensors:
        if path not in flat:
            continue
        parts = flat[path] if path.startswith(_BLOCKS) else [flat[path]]
        for index, part in enumerate(parts):
            yield name.format(index), part if axes is None else part.transpose(axes)


def _layout_shapes(
    shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the shapes of a layout's tensors by name, as `layout_views` does the tensors."""
    for name, path, axes in layout.tensors:
        if path not in shapes:
            continue
        is_stacked = path.startswith(_BLOCKS)
        num_parts = shapes[path][0] if is_stacked else 1
        shape = shapes[path][1:] if is_stacked else shapes[path]
        for index in range(num_parts):
            yield name.format(index), shape if axes is None else tuple(shape[a] for a in axes)


def _find_layout(file: TensorFile) -> tuple[ModelFamily, WeightLayout, str]:
    """Finds the model family and the layout of a file by the names of its tensors.

    Returns:
        The family, the layout, and the prefix of the names in the file.

    Raises:
        UserError: The layout is unknown.
    """
    known = [(family, layout) for family in FAMILIES.values() for layout in family.weight_layouts()]
    names = [*file.shapes, *file.unreadable]
    candidates: dict[str, tuple[ModelFamily, WeightLayout]] = {}
    for name in names:
        prefix, rest = _split_prefix(name)
        for family, layout in known:
            if rest in layout.signature_keys:
                candidates.setdefault(prefix, (family, layout))
    if candidates:
        prefix = min(candidates, key=_rank_prefix)
        return *candidates[prefix], prefix
    keys = [key for _, layout in known for key in layout.signature_keys]
    for name in names:
        key = next((key for key in keys if name.endswith((f".{key}", f"/{key}"))), None)
        if key:
            prefixes = ", ".join(map(repr, _PREFIXES))
            raise file.error(
                name, f"has the unknown prefix {name.removesuffix(key)!r}: known are {prefixes}."
            )
    if not file.shapes:
        file.check_names(file.unreadable)
    expected = ", ".join(map(repr, keys))
    found = ", ".join(repr(name) for name in list(file.shapes)[:3]) or "no tensor"
    raise UserError(
        f"{file.path} is not a known checkpoint: expected one of {expected}, got {found}."
    )


def _split_prefix(name: str) -> tuple[str, str]:
    """Splits a tensor's name into its prefix and the name that it has in a published layout."""
    match = _PREFIX_PATTERN.match(name)
    assert match is not None
    return match[0], _INNER_WRAPPERS.sub("", name[match.end() :])


def _rank_prefix(prefix: str) -> tuple[bool, bool, list[int]]:
    """Returns a sort key of prefixes: no prefix first, then averaged weights, as timm does."""
    parts = _PREFIX_PART.findall(prefix)
    return bool(parts), not _AVERAGED.intersection(parts), [_PREFIXES.index(p) for p in parts]


def _select_names(file: TensorFile, prefix: str) -> dict[str, str]:
    """Maps the names of a layout to those of a file's tensors with a prefix.

    Without a prefix, all tensors are selected, so that unexpected ones are named.

    Raises:
        UserError: Two tensors have the same name in the layout.
    """
    selected: dict[str, str] = {}
    for name in (*file.shapes, *file.unreadable):
        found, rest = _split_prefix(name)
        if prefix and found != prefix:
            continue
        if rest in selected:
            raise file.error(rest, "occurs twice, with different prefixes.")
        selected[rest] = name
    return selected


def _infer_config(
    file: TensorFile, family: ModelFamily, layout: WeightLayout
) -> tuple[InferredConfig, int]:
    """Infers the architecture and the number of classes of a file.

    Raises:
        UserError: A tensor needed for that is missing or has a wrong number of axes.
    """
    tensors = {tensor.path: tensor for tensor in layout.tensors}
    example = next(iter(family.variants.values()))
    example_shapes = family.param_shapes(example, family.image_size_multiple(example), 1)

    def shape(path: str) -> Shape:
        """Returns the shape of a parameter, without the leading axis of blocks."""
        name, axes = tensors[path].name.format(0), tensors[path].axes
        if name not in file.shapes:
            raise file.error(name, "is missing.")
        lengths = file.shapes[name]
        num_axes = len(example_shapes[path]) - path.startswith(_BLOCKS)
        if len(lengths) > num_axes:
            lengths = tuple(length for length in lengths if length != 1)
        if len(lengths) != num_axes:
            raise file.error(name, f"must have {num_axes} axes, got shape {file.shapes[name]}.")
        axes = axes or tuple(range(num_axes))
        return tuple(lengths[axes.index(axis)] for axis in range(num_axes))

    paths = {path for path, tensor in tensors.items() if tensor.name.format(0) in file.shapes}
    inferred = family.infer_config(_count_blocks(file, layout), shape, paths)
    head = [tensor.name for path, tensor in tensors.items() if path.startswith("head/")]
    has_head = any(name in file.shapes for name in head)
    return inferred, shape("head/kernel")[-1] if has_head else 0


def _count_blocks(file: TensorFile, layout: WeightLayout) -> int:
    """Counts the blocks by the name of one tensor of each; 0 if the layout has no blocks."""
    names = [tensor.name for tensor in layout.tensors if tensor.path.startswith(_BLOCKS)]
    if not names:
        return 0
    pattern = re.compile(re.escape(names[0]).replace(r"\{\}", "([0-9]{1,9})"))
    indices = {int(match[1]) for name in file.shapes if (match := pattern.fullmatch(name))}
    num_blocks = next(index for index in itertools.count() if index not in indices)
    if num_blocks < len(indices) or not indices:
        raise file.error(names[0].format(num_blocks), "is missing.")
    return num_blocks


def _check_names_and_shapes(
    file: TensorFile, shapes: dict[str, tuple[int, ...]], layout: WeightLayout
) -> None:
    expected = dict(_layout_shapes(shapes, layout))
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
