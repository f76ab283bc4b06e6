"""Reading and writing of parameters in the layouts that weights are published in.

A file is read into, or written from, views of parameters: every tensor of a layout is a part of one
parameter with its axes in another order, or several of these one after another. Model families
declare their layouts.
"""

import concurrent.futures
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.checkpoints.formats import SelectedTensors, TensorFile, copy_into
from mixer_jax.checkpoints.weights import Tree, allocate_zeros, unflatten_params
from mixer_jax.errors import UserError
from mixer_jax.models.family import (
    InferredConfig,
    ModelFamily,
    Shape,
    TensorMapping,
    WeightLayout,
)
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
    "optimizer/target/",
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
# Names of what training programs save next to weights that have no prefix.
_TRAINING_STATE = ("opt/", "opt_state/", "optimizer/", "chrono/")
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


def read_pretrained(file: TensorFile, recorded: Mapping[str, Any] | None = None) -> LoadedWeights:
    """Reads published weights.

    The architecture is inferred from the names and shapes of the tensors. All of them are checked
    before any tensor is read. Names can have prefixes (`_PREFIXES`); what else a training program
    saved next to the weights is then skipped.

    Args:
        file: Open file.
        recorded: Fields of the architecture config that are stored next to the tensors, for those
            that shapes do not tell.

    Raises:
        UserError: A tensor is missing, unexpected, damaged or not finite, or has a shape that
            contradicts the others.
    """
    family, layout, prefix = _find_layout(file)
    file = SelectedTensors(file, _select_names(file, prefix, layout), prefix)
    for name, shape in file.shapes.items():
        if any(length < 1 for length in shape):
            raise file.error(name, f"must not be empty, got shape {shape}.")
        if name in layout.rejected:
            raise file.error(name, layout.rejected[name])
    (config, num_tokens), num_classes = _infer_config(file, family, layout, recorded or {})
    # Shapes depend on the number of tokens at most, so any image size with this number does.
    side = family.image_size_multiple(config)
    shapes = family.param_shapes(config, (side, side * max(num_tokens, 1)), num_classes)
    _check_names_and_shapes(file, shapes, layout)
    flat = {path: allocate_zeros(shape) for path, shape in shapes.items()}
    parts = dict(_tensor_parts(flat, layout))

    def read(name: str) -> None:
        views = parts[name]
        tensor = views[0] if len(views) == 1 else np.empty(_joined_shape(views), np.float32)
        # A sum is cheap, and not finite if a number is not. Sums of large numbers can overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            file.read(name, tensor)
            is_suspicious = not math.isfinite(tensor.sum())
        if is_suspicious and not np.isfinite(tensor).all():
            raise file.error(name, "must be finite as float32.")
        if len(views) > 1:
            for view, part in zip(views, _split(tensor, views), strict=True):
                copy_into(part, view)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # The largest first, so that threads finish at about the same time.
        names = sorted(parts, key=lambda name: sum(v.size for v in parts[name]), reverse=True)
        for _ in pool.map(read, names):
            pass
    params = unflatten_params(flat)
    return LoadedWeights(params, family.name, config, num_tokens, num_classes, layout)


def layout_tensors(
    flat: Mapping[str, np.ndarray], layout: WeightLayout
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a layout by name, from parameters by path.

    They are views of the parameters, but for those that join several parameters: these are copied
    one by one.
    """
    for name, views in _tensor_parts(flat, layout):
        if len(views) == 1:
            yield name, views[0]
            continue
        tensor = np.empty(_joined_shape(views), views[0].dtype)
        for view, part in zip(views, _split(tensor, views), strict=True):
            copy_into(view, part)
        yield name, tensor


def _layout_shapes(
    shapes: Mapping[str, Shape], layout: WeightLayout
) -> Iterator[tuple[str, Shape]]:
    """Yields the shapes of a layout's tensors by name, as `layout_tensors` does the tensors."""
    for mapping in layout.tensors:
        if not all(path in shapes for path in mapping.paths):
            continue
        is_per_block, num_leading = _block_axes(mapping)
        found = []
        for path in mapping.paths:
            shape = list(shapes[path])
            num_tensors = shape.pop(0) if is_per_block else 1
            if mapping.start:
                shape[1] -= mapping.start
            leading, rest = shape[:num_leading], shape[num_leading:]
            merged = (math.prod(rest[a] for a in group) for group in _groups(mapping, len(rest)))
            found.append((*leading, *merged))
        joined = (sum(shape[0] for shape in found), *found[0][1:])
        for index in range(num_tensors):
            yield mapping.name.format(index), joined


def _tensor_parts(
    flat: Mapping[str, np.ndarray], layout: WeightLayout
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yields the views of parameters that make up each tensor of a layout, by the tensor's name."""
    for mapping in layout.tensors:
        if not all(path in flat for path in mapping.paths):
            continue
        is_per_block, _ = _block_axes(mapping)
        arrays = [flat[path] for path in mapping.paths]
        blocks = zip(*arrays, strict=True) if is_per_block else [arrays]
        for index, parts in enumerate(blocks):
            yield mapping.name.format(index), [_part_view(part, mapping) for part in parts]


def _part_view(array: np.ndarray, mapping: TensorMapping) -> np.ndarray:
    """Returns a view of a parameter, or of one block of it, with the axes of a tensor."""
    if mapping.start:
        array = array[:, mapping.start :]
    if mapping.axes is None:
        return array
    _, num_leading = _block_axes(mapping)
    lengths = array.shape[num_leading:]
    groups = _groups(mapping, len(lengths))
    # Merged axes are consecutive and arrays in C order, so that both steps give views.
    ordered = sorted(range(len(groups)), key=groups.__getitem__)
    merged = (math.prod(lengths[axis] for axis in groups[index]) for index in ordered)
    array = array.reshape(*array.shape[:num_leading], *merged)
    order = (num_leading + ordered.index(index) for index in range(len(groups)))
    return array.transpose(*range(num_leading), *order)


def _block_axes(mapping: TensorMapping) -> tuple[bool, int]:
    """Returns whether there is one tensor per block, and how many axes of blocks a tensor has."""
    is_per_block = "{}" in mapping.name
    return is_per_block, int(mapping.paths[0].startswith(_BLOCKS) and not is_per_block)


def _groups(mapping: TensorMapping, num_axes: int) -> list[tuple[int, ...]]:
    """Returns, for each axis of a tensor after that of blocks, the axes of the parameter in it."""
    axes = range(num_axes) if mapping.axes is None else mapping.axes
    return [(axis,) if isinstance(axis, int) else axis for axis in axes]


def _joined_shape(views: list[np.ndarray]) -> Shape:
    return (sum(len(view) for view in views), *views[0].shape[1:])


def _split(tensor: np.ndarray, views: list[np.ndarray]) -> list[np.ndarray]:
    """Splits a tensor along its first axis into the parts that `views` are."""
    return np.split(tensor, list(itertools.accumulate(len(view) for view in views))[:-1])


def _find_layout(file: TensorFile) -> tuple[ModelFamily, WeightLayout, str]:
    """Finds the model family and the layout of a file by the names of its tensors.

    Returns:
        The family, the layout, and the prefix of the names in the file.

    Raises:
        UserError: The layout is unknown.
    """
    known = [(family, layout) for family in FAMILIES.values() for layout in family.weight_layouts()]
    names = [*file.shapes, *file.unreadable]
    by_prefix: dict[str, list[str]] = {}
    for name in names:
        prefix, rest = _split_prefix(name)
        by_prefix.setdefault(prefix, []).append(rest)
    for prefix in sorted(by_prefix, key=_rank_prefix):
        for family, layout in known:
            canonical = set(map(layout.canonical_name, by_prefix[prefix]))
            if canonical.issuperset(layout.signature_keys):
                return family, layout, prefix
    keys = list(dict.fromkeys(layout.signature_keys[0] for _, layout in known))
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


def _select_names(file: TensorFile, prefix: str, layout: WeightLayout) -> dict[str, str]:
    """Maps the names of a layout to those of a file's tensors with a prefix.

    Without a prefix, all tensors but those of an optimizer are selected, so that unexpected ones
    are named.

    Raises:
        UserError: Two tensors have the same name in the layout.
    """
    selected: dict[str, str] = {}
    for name in (*file.shapes, *file.unreadable):
        found, rest = _split_prefix(name)
        if found != prefix if prefix else name.startswith(_TRAINING_STATE):
            continue
        rest = layout.canonical_name(rest)
        if rest in selected:
            raise file.error(rest, "occurs twice, with different prefixes.")
        selected[rest] = name
    return selected


class _FileShapes:
    """Shapes of the parameters in a file; see `mixer_jax.models.family.FileShapes`."""

    def __init__(
        self,
        file: TensorFile,
        family: ModelFamily,
        layout: WeightLayout,
        recorded: Mapping[str, Any],
    ):
        self.recorded = recorded
        self._file = file
        self._mappings = {path: mapping for mapping in layout.tensors for path in mapping.paths}
        example = next(iter(family.variants.values()))
        self._example = family.param_shapes(example, family.image_size_multiple(example), 1)

    def __contains__(self, path: str) -> bool:
        return path in self._mappings and self._mappings[path].name.format(0) in self._file.shapes

    def __call__(self, path: str) -> Shape:
        mapping = self._mappings[path]
        name = mapping.name.format(0)
        if name not in self._file.shapes:
            raise self._file.error(name, "is missing.")
        lengths = list(self._file.shapes[name])
        is_per_block, num_leading = _block_axes(mapping)
        num_axes = len(lengths) - num_leading
        if path in self._example:
            num_axes = len(self._example[path]) - path.startswith(_BLOCKS)
        groups = _groups(mapping, num_axes)
        # Files with older names have additional axes of length 1.
        while len(lengths) > num_leading + len(groups) and 1 in lengths:
            lengths.remove(1)
        if len(lengths) != num_leading + len(groups):
            expected = num_leading + len(groups)
            raise self._file.error(
                name, f"must have {expected} axes, got shape {self._file.shapes[name]}."
            )
        num_paths = len(mapping.paths)
        if lengths[0] % num_paths:
            raise self._file.error(
                name,
                f"must have a first axis of {num_paths} equal parts, got shape "
                f"{self._file.shapes[name]}.",
            )
        lengths[0] //= num_paths
        shape = [0] * num_axes
        for length, group in zip(lengths[num_leading:], groups, strict=True):
            if len(group) == 1:
                shape[group[0]] = length
        if mapping.start:
            shape[1 - is_per_block] += mapping.start
        return tuple(shape)


def _infer_config(
    file: TensorFile, family: ModelFamily, layout: WeightLayout, recorded: Mapping[str, Any]
) -> tuple[InferredConfig, int]:
    """Infers the architecture and the number of classes of a file.

    Raises:
        UserError: A tensor needed for that is missing or has a wrong number of axes.
    """
    shapes = _FileShapes(file, family, layout, recorded)
    try:
        for path in layout.required:
            shapes(path)
        inferred = family.infer_config(_count_blocks(file, layout), shapes)
    except UserError as error:
        message = str(error)
        raise UserError(
            message if message.startswith(file.path) else f"{file.path}: {message}"
        ) from error
    has_head = "head/kernel" in shapes or "head/bias" in shapes
    return inferred, shapes("head/kernel")[-1] if has_head else 0


def _count_blocks(file: TensorFile, layout: WeightLayout) -> int:
    """Counts the blocks by the name of one tensor of each; 0 if the layout has no blocks.

    In a layout that stacks the blocks, it is the length of the first axis of such a tensor.
    """
    name = next((m.name for m in layout.tensors if m.paths[0].startswith(_BLOCKS)), None)
    if name is None:
        return 0
    if "{}" not in name:
        if not file.shapes.get(name):
            raise file.error(name, "is missing.")
        return file.shapes[name][0]
    pattern = re.compile(re.escape(name).replace(r"\{\}", "([0-9]{1,9})"))
    indices = {int(match[1]) for name in file.shapes if (match := pattern.fullmatch(name))}
    num_blocks = next(index for index in itertools.count() if index not in indices)
    if num_blocks < len(indices) or not indices:
        raise file.error(name.format(num_blocks), "is missing.")
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
