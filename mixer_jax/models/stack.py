"""Stack of equal residual blocks: scanned or unrolled, rematerialized, on any backend.

Parameters of the blocks are stacked under "blocks" on a leading axis of length `num_blocks`. A list
with the parameters of each block is accepted as well, and is unrolled.
"""

import dataclasses
import operator
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from mixer_jax.models.execution import Execution
from mixer_jax.models.family import LOGITS, PRE_LOGITS, ImageModel, check_layers
from mixer_jax.models.layers import (
    ATTENTION,
    MLP_OUTPUT,
    Context,
    DropPathMask,
    LayerNorm,
    bernoulli_per_example,
)

# Residuals saved for the backward pass besides each block's input.
REMAT_POLICIES = {
    # Attention's matmuls have batch dimensions; its gradient needs the output, but no weights.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
    "mlp_hidden": jax.checkpoint_policies.save_only_these_names(MLP_OUTPUT, ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Ampere, the first GPUs for which cuDNN has attention kernels.
_FLASH_ATTENTION_CAPABILITY = 8.0


class BlockBackend(Protocol):
    """Another way to compute a stack of blocks: the same function of the same parameters.

    A backend is constructed from the model and the number of tokens. What it carries from block to
    block is private to it.
    """

    # Whether the patch embedding yields (s, n, c) instead of (n, s, c).
    token_major: ClassVar[bool]

    def begin(self, tokens: Array, drop_path: bool) -> Any:
        """Returns the carry before the first block.

        Args:
            tokens: Output of the patch embedding.
            drop_path: Whether blocks will get drop-path masks.
        """

    def block(self, params: Mapping[str, Any], carry: Any, masks: tuple[DropPathMask, ...]) -> Any:
        """Applies one block to the carry."""

    def end(self, norm_params: Mapping[str, Any], carry: Any) -> Float[Array, "n s c"]:
        """Applies the final LayerNorm to the carry."""


def active_backend(model: Any, train: bool) -> str:
    """Returns the backend that computes a model's blocks: custom kernels do not support dropout."""
    # Parameters are the same on all backends, and modules initialize them. Kernels do not expose
    # the intermediate activations within a block.
    needs_modules = (
        _is_initializing(model)
        or _captures_intermediates(model)
        or (train and _get_rate(model, "dropout"))
    )
    backend: str = model.execution.backend
    has_backend = backend in getattr(model, "block_backends", {})
    return backend if has_backend and not needs_modules else "xla"


def _backend_class(model: Any, train: bool) -> Any:
    """Imports the class of a model's active backend; None for "xla"."""
    location = getattr(model, "block_backends", {}).get(active_backend(model, train))
    return None if location is None else pkgutil.resolve_name(location)


def _is_initializing(model: nn.Module) -> bool:
    return model.scope is not None and model.is_initializing()


def _captures_intermediates(model: nn.Module) -> bool:
    return model.scope is not None and model.is_mutable_collection("intermediates")


def _get_rate(model: Any, name: str) -> float:
    """Returns a model's `dropout` or `stochastic_depth`, 0 if it lacks it."""
    return getattr(model, name, 0.0)


def use_partitionable_backend(model: ImageModel, num_devices: int) -> Any:
    """Returns a model that can be compiled for images sharded over `num_devices`.

    Custom kernels take the images of one device; the compiler partitions only its own operations.
    """
    if num_devices == 1:
        return model
    return model.clone(execution=dataclasses.replace(model.execution, backend="xla"))


def _uses_flat_layout(execution: Execution) -> bool:
    if execution.flatten_batch is not None:
        return execution.flatten_batch
    return (execution.target_device_kind or jax.devices()[0].device_kind) == "cpu"


def _has_flash_attention(execution: Execution) -> bool:
    """Returns whether programs are for the GPU here, and cuDNN has attention kernels for it."""
    device = jax.devices()[0]
    is_nvidia = device.device_kind.startswith("NVIDIA") and not execution.target_device_kind
    return is_nvidia and float(device.compute_capability) >= _FLASH_ATTENTION_CAPABILITY


def stochastic_depth_rates(model: Any) -> Float[Array, " num_blocks"]:
    """Returns each block's drop probability, rising linearly from 0 to `stochastic_depth`."""
    rate = _get_rate(model, "stochastic_depth")
    return jnp.linspace(0.0, rate, model.config.num_blocks, dtype=jnp.float32)


def make_context(model: Any, train: bool) -> Context:
    """Creates the settings that the layers of a model read in one call."""
    backend = _backend_class(model, train)
    return Context(
        dtype=jnp.dtype(model.execution.dtype),
        train=train,
        flatten_batch=_uses_flat_layout(model.execution),
        token_major=backend is not None and backend.token_major,
        flash_attention=_has_flash_attention(model.execution),
    )


class DropPathMasks(nn.Module):
    """Random drop-path masks of a block's branches."""

    num_branches: int
    dtype: Any

    @nn.compact
    def __call__(
        self, drop_rate: Float[Array, ""], example_index: Int[Array, " n"]
    ) -> tuple[Float[Array, " n"], ...]:
        """Draws a mask for each branch, 1 for examples that keep it and 0 for the others."""

        def draw() -> Array:
            rng = self.make_rng("stochastic_depth")
            mask = bernoulli_per_example(rng, example_index, 1.0 - drop_rate, ())
            return mask.astype(self.dtype)

        return tuple(draw() for _ in range(self.num_branches))


def block_stack(
    model: Any,
    block: Any,
    x: Float[Array, "a b c"],
    example_index: Int[Array, " n"],
    norm_name: str,
) -> Float[Array, "n s c"]:
    """Applies a model's blocks and final LayerNorm, declaring their parameters in its scope.

    Random keys are split over blocks before these are scanned or unrolled, so that masks do not
    depend on `scan_unroll`.

    Args:
        model: Calling module, in its compact method: an `ImageModel` with `config.num_blocks`.
        block: Unbound module of (tokens, drop-path masks of its branches, example_index), with
            attributes `num_branches` and `ctx`, from `make_context`.
        x: Output of the patch embedding: (n, s, c), or (s, n, c) if `ctx.token_major`.
        example_index: Index of each example in the global batch.
        norm_name: Name of the final LayerNorm's parameters.
    """
    norm, train = LayerNorm(name=norm_name), block.ctx.train
    if model.is_initializing():
        return norm(_initialize(model, block, x, example_index))
    backend_class = _backend_class(model, train)
    if backend_class is None:
        apply_block, carry = _xla_block(model, block, example_index), x
        tokens = norm(_apply_blocks(model, block, apply_block, carry, example_index))
        model.sow("intermediates", "tokens", tokens)
        return tokens
    backend: BlockBackend = backend_class(model, x.shape[0 if backend_class.token_major else 1])

    def apply_custom(params: Any, carry: Any, masks: Any, rngs: Any) -> tuple[Any, None]:
        with jax.named_scope(type(block).__name__):
            return backend.block(params, carry, masks), None

    carry = backend.begin(x, drop_path=train and _get_rate(model, "stochastic_depth") > 0)
    carry = _apply_blocks(model, block, apply_custom, carry, example_index)
    with jax.named_scope(norm_name):
        return backend.end(model.variables["params"][norm_name], carry)


def _initialize(model: Any, block: Any, x: Array, example_index: Array) -> Array:
    """Applies the blocks so that their stacked parameters are initialized."""
    attributes = {
        field.name: getattr(block, field.name)
        for field in dataclasses.fields(block)
        if field.name not in ("parent", "name")
    }

    def step(module: Any, x: Array) -> tuple[Array, None]:
        return module(x, (None,) * block.num_branches, example_index), None

    scan = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=model.config.num_blocks,
    )
    return scan(type(block)(**attributes, name="blocks"), x)[0]


def _xla_block(model: Any, block: Any, example_index: Array) -> Any:
    """Returns a function that applies one block's module, and captures its intermediates."""
    captures = _captures_intermediates(model)

    def apply(params: Any, x: Array, masks: Any, rngs: Any) -> tuple[Array, Any]:
        args: Any = ({"params": params}, x, masks, example_index)
        if not captures:
            return block.apply(*args, rngs=rngs), None
        y, state = block.apply(*args, rngs=rngs, mutable=["intermediates"])
        return y, (_flatten_intermediates(state), y)

    return apply


def _apply_blocks(
    model: Any, block: Any, apply_block: Any, carry: Any, example_index: Array
) -> Any:
    """Applies all blocks to a carry, scanned or unrolled."""
    execution, train = model.execution, block.ctx.train
    num_blocks = model.config.num_blocks
    keys = {
        name: jax.random.split(model.make_rng(name), num_blocks)
        for name in ("dropout", "stochastic_depth")
        if train and _get_rate(model, name)
    }
    blocks = model.variables["params"]["blocks"]
    scanned = 0 < execution.scan_unroll < num_blocks and not isinstance(blocks, list)
    drop_path = DropPathMasks(block.num_branches, block.ctx.dtype, parent=None)

    def apply(carry: Any, inputs: Any) -> tuple[Any, Any]:
        params, drop_rate, rngs = inputs
        masks: Any = (None,) * block.num_branches
        if "stochastic_depth" in rngs:
            masks = drop_path.apply({}, drop_rate, example_index, rngs=rngs)
        return apply_block(params, carry, masks, rngs)

    if execution.remat != "none":
        # In a scan the compiler cannot undo the recomputation, so that no barrier is needed.
        policy = REMAT_POLICIES[execution.remat]
        apply = jax.checkpoint(apply, policy=policy, prevent_cse=not scanned)
    if scanned:
        inputs = (blocks, stochastic_depth_rates(model), keys)
        carry, stacked = jax.lax.scan(apply, carry, inputs, unroll=execution.scan_unroll)
        outputs = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(num_blocks)]
    else:
        # Traced and lowered once for all blocks; the compiler inlines it for each.
        apply, outputs = jax.jit(apply), []
        for index, params in enumerate(_unstack_blocks(blocks)):
            stacked = (stochastic_depth_rates(model), keys)
            drop_rate, rngs = jax.tree.map(operator.itemgetter(index), stacked)
            carry, output = apply(carry, (params, drop_rate, rngs))
            outputs.append(output)
    for index, output in enumerate(outputs if _captures_intermediates(model) else []):
        branches, x = output
        for name, branch in branches.items():
            model.sow("intermediates", f"blocks.{index}.{name}", branch)
        model.sow("intermediates", f"blocks.{index}", x)
    return carry


def _unstack_blocks(blocks: Any) -> list[Any]:
    """Splits stacked parameters into those of each block, differentiably; a list is one already.

    `lax.split` has a gradient of one concatenation. Indexing N times would instead have N gradients
    of the whole size, to be added up.
    """
    if isinstance(blocks, list):
        return blocks
    leaves, tree = jax.tree.flatten(blocks)
    split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
    per_block = ([part[0] for part in parts] for parts in zip(*split, strict=True))
    return [jax.tree.unflatten(tree, block) for block in per_block]


def forward_intermediates(
    model: ImageModel,
    params: Any,
    images: Float[Array, "n h w 3"],
    layers: Sequence[str] | None = None,
) -> tuple[Float[Array, "n outputs"], dict[str, Array]]:
    """Computes a model's outputs and its intermediate activations.

    Activations are named as by `ModelFamily.layers`, such as "stem" (n, s, c), "blocks.3", and
    "blocks.3.token_mixing" for a branch of that block before it is added. "pre_logits" (n, c) is
    the input of the head.

    Args:
        model: Model with or without a stack of blocks.
        params: Its parameters.
        images: Pixels in [-1, 1].
        layers: Names of activations to return, in this order; None: all of them.

    Raises:
        UserError: The model has no such layer.
    """
    outputs, state = model.apply({"params": params}, images, mutable=["intermediates"])
    named = _flatten_intermediates(state)
    if layers is None:
        return outputs, named
    check_layers(layers, named)
    return outputs, {name: named[name] for name in layers}


def compute_layers(
    model: ImageModel, params: Any, images: Float[Array, "n h w 3"], layers: Sequence[str]
) -> dict[str, Float32[Array, "n ..."]]:
    """Computes activations and logits by name, in float32.

    The input of the head alone is computed by any block backend; other activations need "xla".

    Args:
        model: Model with or without a head.
        params: Its parameters.
        images: Pixels in [-1, 1].
        layers: Names among `ModelFamily.layers`.
    """
    if set(layers) == {PRE_LOGITS}:
        features = model.clone(num_classes=0).apply({"params": params}, images)
        return {PRE_LOGITS: features.astype(jnp.float32)}
    outputs, found = forward_intermediates(model, params, images)
    found |= {LOGITS: outputs} if model.num_classes else {}
    return {name: found[name].astype(jnp.float32) for name in layers}


def _flatten_intermediates(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sown activations by name.

    Some are sown with the suffix "_output", since a module has the name of the layer.
    """
    flat = flax.traverse_util.flatten_dict(state.get("intermediates", {}), sep=".")
    return {name.removesuffix("_output"): value for name, (value,) in flat.items()}
