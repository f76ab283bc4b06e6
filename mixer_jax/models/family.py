"""Interface of a model family. Does not import JAX."""

import abc
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from mixer_jax.errors import UserError, abbreviate, suggest
from mixer_jax.models.execution import Execution

# A variant whose architecture is given in full by overrides.
CUSTOM = "custom"
# The architecture and GELU of the checkpoint in config.init_from.
INIT_FROM = "init_from"
# Attributes that configs set, and the values that have no effect in a model without them.
OPTIONAL_ATTRIBUTES = {"gelu": "tanh", "stochastic_depth": 0.0, "dropout": 0.0, "head_bias": 0.0}

# Layers of every model: the input of the head, and its output.
PRE_LOGITS, LOGITS = "pre_logits", "logits"

Path = tuple[str, ...]  # Names from the root of the parameter tree to one array.
Shape = tuple[int, ...]
ImageSize = tuple[int, int]  # Height and width, in pixels.
# Input and output axes of a parameter that is a matrix, counted from its last axis, which is -1.
MatrixAxes = tuple[tuple[int, ...], tuple[int, ...]]


class Layer(NamedTuple):
    """Intermediate activation: its shape without the axis of images, and its meaning."""

    shape: Shape
    description: str


class ResizedConfig(NamedTuple):
    """Architecture of a model for another image size.

    Attributes:
        config: Architecture config.
        method: Method of adapting parameters; "identity" leaves them as they are.
        note: Description of a lossy or unusual method, with {} for the old size; may be empty.
    """

    config: Any
    method: str
    note: str


class InferredConfig(NamedTuple):
    """Architecture inferred from tensors, and their number of patches.

    `num_tokens` is 0 if they fit any image size.
    """

    config: Any
    num_tokens: int


@runtime_checkable
class FileShapes(Protocol):
    """Shapes of the parameters in a file of weights, from which an architecture is inferred."""

    @property
    def recorded(self) -> Mapping[str, Any]:
        """Fields of the config that are stored next to the weights; untrusted, often empty."""

    def __call__(self, path: str) -> Shape:
        """Returns a parameter's shape, without the leading axis of blocks.

        The lengths of axes that the layout merges are unknown, and 0.

        Raises:
            UserError: The file does not have the parameter.
        """

    def __contains__(self, path: str) -> bool:
        """Returns whether the file has a parameter."""


class TimmModel(NamedTuple):
    """A model that timm creates by name.

    Attributes:
        name: Name of the model in timm.
        args: Further arguments of `timm.create_model`, as JSON.
        python_args: Those of `args` that timm takes as Python objects only, as source code.
    """

    name: str
    args: Mapping[str, Any]
    python_args: Mapping[str, str] = {}


# Order of a parameter's axes in a tensor. Nested ones are merged into one, of length 1 if empty.
Axes = tuple[int | tuple[int, ...], ...]


class TensorMapping(NamedTuple):
    """One tensor of a weight layout, or one per block: a parameter with its axes reordered.

    Attributes:
        name: Name of the tensor. {} is replaced by the index of its block; without it, the tensor
            has the leading axis of the blocks.
        path: Slash-separated path of the parameter; or several, which the tensor has one after
            another along its first axis.
        axes: Order of a parameter's axes in the tensor, without that of the blocks; None: the same.
            A nested tuple of consecutive axes is merged into one: (2, (0, 1)) is the transposed
            matrix of a kernel (heads, features, channels). (1, 0, (), ()) is that of a matrix as
            the kernel of a 1×1 convolution.
        start: First entry along the parameter's second axis that the tensor has; earlier ones are
            zero.
    """

    name: str
    path: str | tuple[str, ...]
    axes: Axes | None = None
    start: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all parameters in the tensor."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Names and axes of published weights, and the GELU and evaluation crop they are used with.

    Attributes:
        name: Name for people.
        tensors: All tensors; those of parameters that a model lacks are absent.
        signature_keys: Names of tensors, all of which a file of this layout has. A file of another
            family's layout does not; of the layouts of one family, the first that fits counts.
        gelu: "tanh" or "exact".
        eval_crop: Crop, as in `config.preprocess.eval_crop`.
        eval_crop_fractions: Its side as a fraction of the resized image's, by the image size in
            pixels from which on it applies.
        aliases: Other spellings of tensors' names in files, as regular expressions, and the
            replacement that gives the name here.
        rejected: Why a file with a tensor of this name is not supported.
        required: Paths of parameters that all models in this layout have, of those that other
            models of the family can lack.
    """

    name: str
    tensors: Sequence[TensorMapping]
    signature_keys: tuple[str, ...]
    gelu: str
    eval_crop: str
    eval_crop_fractions: Mapping[int, float] = dataclasses.field(default_factory=lambda: {0: 0.875})
    aliases: tuple[tuple[str, str], ...] = ()
    rejected: Mapping[str, str] = dataclasses.field(default_factory=dict)
    required: frozenset[str] = frozenset()

    def eval_crop_fraction(self, image_size: ImageSize) -> float:
        """Returns the side of the crop for an image size, as a fraction of the resized image's."""
        sizes = [size for size in self.eval_crop_fractions if size <= min(image_size)]
        return self.eval_crop_fractions[max(sizes)]

    def canonical_name(self, name: str) -> str:
        """Returns the name of a file's tensor in this layout."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name


class Traffic(NamedTuple):
    """Lower bounds on the FLOPs and memory traffic of a region of the model, per image.

    Attributes:
        flops: FLOPs of matmuls; a multiply-add is two.
        unfused_bytes: Bytes if each matmul is a separate kernel.
        fused_flops: FLOPs, including recomputation, if each residual branch is one kernel.
        fused_bytes: Bytes if each residual branch is one kernel, which keeps hidden units on-chip.
    """

    flops: float
    unfused_bytes: float
    fused_flops: float
    fused_bytes: float


@runtime_checkable
class ImageModel(Protocol):
    """Flax module of a family: what training, evaluation and inference read from a model.

    Its call takes images (n, h, w, 3) with pixels in [-1, 1], whether it trains, and the index of
    each example in the global batch; it returns float32 logits, or features if `num_classes` is 0.
    The head's parameters are under "head". A model may also have `dropout` and `stochastic_depth`,
    which count as 0 otherwise and use the random stream of that name, and `block_backends`, those
    of its family.
    """

    family: ClassVar[str]
    config: Any
    num_classes: int
    execution: Execution

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes the parameters; see `flax.linen.Module.init`."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the outputs; see `flax.linen.Module.apply`."""

    def clone(self, **updates: Any) -> Any:
        """Copies the module with other attributes; see `flax.linen.Module.clone`."""


@runtime_checkable
class CostModel(Protocol):
    """Memory, recomputation and memory traffic of a training step, per image and by formula.

    Images are squares of `image_size` pixels; activations have `itemsize` bytes per element.
    """

    def recomputed_flops(self, config: Any, image_size: int, remat: str) -> int:
        """Returns the FLOPs that a remat policy recomputes, counting matmuls only."""

    def saved_activation_bytes(
        self, config: Any, image_size: int, remat: str, itemsize: int
    ) -> float:
        """Returns the bytes of residuals saved for the backward pass, in all blocks."""

    def live_block_bytes(self, config: Any, image_size: int, itemsize: int) -> float:
        """Returns the bytes that are live in the middle of one block."""

    def estimate_traffic(
        self,
        config: Any,
        image_size: int,
        num_classes: int,
        *,
        batch_size: int,
        itemsize: int,
        train: bool,
    ) -> dict[str, Traffic]:
        """Estimates the traffic per region and step, without the optimizer.

        The images of a batch share the traffic of parameters.
        """


class ModelFamily(abc.ABC):
    """A family of models: its variants, their sizes and costs, and rules for their parameters.

    Configs are frozen dataclasses, one field per architectural choice. Everything but `build`,
    `get_module_class` and `resize_params` works without JAX.
    """

    # Key in configs and checkpoints, e.g. "mixer".
    name: ClassVar[str]
    # Prefix of full names, e.g. "Mixer" in "Mixer-B/16".
    display_name: ClassVar[str]
    config_class: ClassVar[type]
    variants: ClassVar[Mapping[str, Any]]
    # Name of the first layer if it is linear, so that the normalization of pixels can be folded
    # into its kernel and bias; else empty.
    stem: ClassVar[str] = "stem"
    # Modules of the head. `layer_groups` assigns all others after the blocks to the last block.
    head_modules: ClassVar[tuple[str, ...]] = ("head",)
    # Whether the models have a GELU, and so its variant in the metadata has a meaning.
    has_gelu: ClassVar[bool] = True
    # Custom backends of a stack of blocks besides "xla", as "module:class"; imported when used.
    block_backends: ClassVar[Mapping[str, str]] = {}
    # Image size of weights that fit any size, if neither they nor the user name one.
    default_image_size: ClassVar[int] = 224
    # Regions of compiled programs: patterns of operations' names, of which the first match counts.
    regions: ClassVar[Mapping[str, str]] = {}

    def get_config(self, variant: str, **overrides: Any) -> Any:
        """Returns a variant's config with overrides applied.

        Args:
            variant: Name of a variant, or "custom", which needs every field without a default.
            **overrides: Fields of the config. 0 and "" keep the variant's own value.

        Raises:
            UserError: The variant is unknown, a number is negative, or a field is missing or
                belongs to another family.
        """
        fields = dataclasses.fields(self.config_class)
        names = [field.name for field in fields]
        requested = {name: value for name, value in overrides.items() if value not in (0, "")}
        for name, value in requested.items():
            if name not in names:
                raise UserError(
                    f"model.{name} must be left out for {self.display_name}, whose architecture "
                    f"has {', '.join(names)}, got {value!r}."
                )
            if isinstance(value, int | float) and value < 0:
                raise UserError(f"model.{name} must be positive, got {value}.")
        if variant == CUSTOM:
            required = [f.name for f in fields if f.default is dataclasses.MISSING]
            if missing := [name for name in required if name not in requested]:
                raise UserError(
                    "model.variant='custom' needs the whole architecture. Set "
                    f"{', '.join(missing)}."
                )
            return self.config_class(**requested)
        if variant not in self.variants:
            known = ", ".join([*self.variants, CUSTOM])
            raise UserError(f"model.variant must be one of {known}, got {variant!r}.")
        return dataclasses.replace(self.variants[variant], **requested)

    def infer_variant(self, config: Any) -> str:
        """Returns the name of the variant with this config, or "custom"."""
        return next((name for name, known in self.variants.items() if known == config), CUSTOM)

    def full_name(self, variant: str) -> str:
        """Returns a variant's name with that of the family, e.g. "Mixer-B/16"."""
        return f"{self.display_name}-{variant}"

    def num_blocks(self, config: Any) -> int:
        """Returns the number of blocks that can be scanned over; 0 without such a stack."""
        return int(getattr(config, "num_blocks", 0))

    @abc.abstractmethod
    def get_module_class(self) -> Any:
        """Imports and returns the Flax module's class, an `ImageModel`."""

    def build(self, config: Any, num_classes: int, **attributes: Any) -> Any:
        """Builds the Flax module.

        Args:
            config: Architecture config.
            num_classes: Outputs of the head; 0 means no head.
            **attributes: `execution`, and attributes of the module. Those of `OPTIONAL_ATTRIBUTES`
                may be missing in a module, if they have no effect.

        Raises:
            UserError: The family does not support an attribute.
        """
        module = self.get_module_class()
        names = {field.name for field in dataclasses.fields(module)}
        for name in OPTIONAL_ATTRIBUTES.keys() & attributes.keys() - names:
            if (value := attributes.pop(name)) != OPTIONAL_ATTRIBUTES[name]:
                raise UserError(
                    f"model.{name} must be {OPTIONAL_ATTRIBUTES[name]!r} for {self.display_name}, "
                    f"got {value!r}."
                )
        return module(config, num_classes, **attributes)

    @abc.abstractmethod
    def param_shapes(
        self, config: Any, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        """Returns the shape of each parameter by its slash-separated path."""

    def layers(self, config: Any, image_size: ImageSize, num_classes: int) -> dict[str, Layer]:
        """Returns the activations that the module sows, by name in the order of computation.

        The module sows every name but "logits"; `block_stack` sows "tokens", "blocks.0" and so on.
        """
        width, _ = self.param_shapes(config, image_size, 1)["head/kernel"]
        return head_layers(width, num_classes)

    def layer_groups(self, config: Any) -> dict[str, Sequence[str]]:
        """Groups modules by depth, from the input to the head, for layer-wise learning rates.

        Groups are those of timm: modules before the blocks are the first, and a normalization after
        the blocks belongs to the last block.

        Returns:
            Names of the modules by layer; "blocks.3" is a block of a stack.
        """
        shapes = self.param_shapes(config, self.image_size_multiple(config), num_classes=1)
        modules = list(dict.fromkeys(path.partition("/")[0] for path in shapes))
        head = [module for module in modules if module in self.head_modules]
        body = [module for module in modules if module not in self.head_modules]
        groups: dict[str, Sequence[str]]
        if self.num_blocks(config):
            index = body.index("blocks")
            blocks = [f"blocks.{block}" for block in range(self.num_blocks(config))]
            groups = {"stem": body[:index], **{block: [block] for block in blocks}}
            groups[blocks[-1]] = [blocks[-1], *body[index + 1 :]]
        else:
            groups = {module: [module] for module in body}
        return groups | {"head": head}

    def num_params(self, config: Any, image_size: int | ImageSize, num_classes: int) -> int:
        """Returns the number of parameters; `num_classes` 0 means no head."""
        return sum(map(math.prod, self.param_shapes(config, image_size, num_classes).values()))

    @abc.abstractmethod
    def forward_flops(self, config: Any, image_size: int | ImageSize, num_classes: int) -> int:
        """Returns the FLOPs of one image's forward pass, counting matmuls and convolutions only.

        A multiply-add is two FLOPs.
        """

    @property
    def cost_model(self) -> CostModel:
        """Memory, recomputation and memory traffic per step, for `plan` and benchmarks.

        Raises:
            UserError: The family has no cost model.
        """
        raise UserError(
            f"model.family must be one with a cost model, such as mixer, got {self.name!r}."
        )

    def image_size_multiple(self, config: Any) -> int:
        """Returns the divisor of valid heights and widths, in pixels."""
        del config
        return 1

    @abc.abstractmethod
    def check_image_size(self, config: Any, height: int, width: int) -> None:
        """Raises UserError, naming the nearest valid sizes, unless the model accepts the size."""

    @abc.abstractmethod
    def resize_config(self, config: Any, old: ImageSize, new: ImageSize) -> ResizedConfig:
        """Returns the config of the model that `resize_params` makes parameters for."""

    @abc.abstractmethod
    def resize_params(self, params: Any, config: Any, old: ImageSize, new: ImageSize) -> Any:
        """Adapts parameters, as numpy arrays, to another image size."""

    def stem_filters(self, params: Any) -> Any:
        """Returns the filters that the first layer applies to pixels.

        Args:
            params: Parameters, as NumPy or JAX arrays.

        Returns:
            Array (height, width, 3, filters); None if the family has no such layer.
        """
        return params[self.stem]["kernel"] if self.stem else None

    def token_mixing_units(self, params: Any, config: Any, image_size: ImageSize) -> Any:
        """Returns the input weights of the hidden units of MLPs that mix tokens.

        Args:
            params: Parameters, as NumPy or JAX arrays.
            config: Architecture config.
            image_size: Height and width, in pixels.

        Returns:
            Array (num_blocks, units, rows, columns), with one weight per patch of the image; None
            if the family has no such MLPs.
        """
        del params, config, image_size
        return None

    def config_for_new_head(self, config: Any) -> Any:
        """Returns the config without layers that fine-tuning replaces together with the head."""
        return config

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        """Returns the layouts that weights of this family are published in."""
        return ()

    def timm_expression(
        self, variant: str, config: Any, image_size: ImageSize, num_classes: int, gelu: str
    ) -> str:
        """Returns a Python expression that creates timm's model, after `import timm`.

        Args:
            variant: Name of a variant, or "custom".
            config: Architecture config.
            image_size: Height and width, in pixels.
            num_classes: Outputs of the head; 0 means no head.
            gelu: "tanh" or "exact".

        Raises:
            UserError: timm has no such model.
        """
        raise UserError(f"timm must have a model for these weights, got {self.full_name(variant)}.")

    def timm_model(self, config: Any, gelu: str) -> TimmModel:
        """Finds the model of `timm.create_model` that a folder of weights can name.

        Args:
            config: Architecture config.
            gelu: "tanh" or "exact".

        Raises:
            UserError: No named model has this architecture, whatever its arguments.
        """
        raise self.not_in_timm(config, f"timm names no {self.display_name}")

    def not_in_timm(self, config: Any, reason: str) -> UserError:
        """Creates the error for a model that timm cannot create by name."""
        return UserError(
            f"model must be one that timm creates by name, got "
            f"{self.full_name(self.infer_variant(config))}: {reason}. Export a file that ends in "
            ".safetensors instead."
        )

    @abc.abstractmethod
    def infer_config(self, num_blocks: int, shape: FileShapes) -> InferredConfig:
        """Infers the architecture from tensors.

        Args:
            num_blocks: Number of blocks found; 0 if the layout has none.
            shape: Function from the path of a parameter to its shape, without the leading axis of
                blocks.

        Raises:
            UserError: A parameter that is needed is missing, or the shapes fit no architecture.
        """

    def is_weight_decayed(self, path: Path) -> bool:
        """Returns whether weight decay applies: to kernels, not to biases and normalization."""
        return path[-1] == "kernel"

    def is_stacked(self, path: Path) -> bool:
        """Returns whether a parameter has a leading axis of blocks."""
        return path[0] == "blocks"

    def matrix_axes(self, path: Path) -> MatrixAxes | None:
        """Returns the axes of a hidden layer's matrix, which Muon orthogonalizes; else None.

        These are kernels of blocks. Stem, head, biases, embeddings and scales are no such matrices
        (arXiv 2502.16982, Section 2).
        """
        return ((-2,), (-1,)) if self.is_stacked(path) and path[-1] == "kernel" else None

    def is_fsdp_sharded(self, path: Path) -> bool:
        """Returns whether a parameter is sharded over "fsdp"; all others are replicated.

        Kernels hold all but about a thousandth of the parameters. Sharding the rest would save
        nothing and send many small messages.
        """
        return path[-1] == "kernel"

    def is_cast(self, path: Path) -> bool:
        """Returns whether the model casts a parameter to the computation's dtype.

        These can be cast before they are sent to other devices, or once when they are loaded.
        """
        return path[-1] == "kernel" and path[0] != "head"


def check_layers(layers: Sequence[str], known: Iterable[str]) -> None:
    """Raises UserError, with similar names, unless all layers are known and there is one."""
    names = list(known)
    if not layers:
        raise UserError(f"layers must not be empty. Choose among {abbreviate(names)}")
    for name in layers:
        if name not in names:
            fix = suggest(name, names, limit=3) or f" Choose among {abbreviate(names)}"
            raise UserError(
                f"layers must be among the {len(names)} of the model, got {name!r}.{fix}"
            )


def stack_layers(
    num_blocks: int, shape: Shape, block: str, branches: Mapping[str, str]
) -> dict[str, Layer]:
    """Returns the layers that `block_stack` and its blocks sow: branches, blocks, and "tokens".

    Args:
        num_blocks: Number of blocks.
        shape: Tokens and channels.
        block: Description of a block's output, with {} for its index.
        branches: Description of each sown branch, with {} for the index of its block.
    """
    layers = {}
    for index in range(num_blocks):
        for name, description in branches.items():
            layers[f"blocks.{index}.{name}"] = Layer(shape, description.format(index))
        layers[f"blocks.{index}"] = Layer(shape, block.format(index))
    return layers | {"tokens": Layer(shape, "output of the last LayerNorm")}


def head_layers(width: int, num_classes: int) -> dict[str, Layer]:
    """Returns the layers of every model: the input of the head, and the logits if it has one."""
    layers = {PRE_LOGITS: Layer((width,), "features: input of the head")}
    return layers | ({LOGITS: Layer((num_classes,), "output of the head")} if num_classes else {})


# Largest number of blocks, channels and so on: functions that count up to one must end.
_MAX_SIZE = 2**20


def architecture_key(
    help_text: str, unit: str = "", min: float = 0, default: Any = dataclasses.MISSING
) -> Any:
    """Declares a field of an architecture config, which is also a key `model.<name>` of configs.

    Args:
        help_text: One line, without the unit.
        unit: Unit of the value, e.g. "px".
        min: Smallest value allowed; 0, or "" for text, keeps the variant's value.
        default: Value of variants that do not set it.
    """
    metadata = {"help": help_text, "unit": unit, "min": min, "max": _MAX_SIZE}
    return dataclasses.field(default=default, metadata=metadata)


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raises UserError, naming the nearest valid sizes, unless whole patches cover the image."""
    for size in (height, width):
        if size < patch_size or size % patch_size:
            below = max(size // patch_size, 1) * patch_size
            raise UserError(
                f"image_size must be a multiple of patch_size ({patch_size}), got {size}. "
                f"The nearest valid sizes are {below} and {below + patch_size}."
            )
