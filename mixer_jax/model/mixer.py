"""MLP-Mixer: patches, then blocks that mix tokens and channels by turns (the paper's Section 2)."""

import dataclasses
import operator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixer_jax.model.blocks import Kernels, MixerBlock
from mixer_jax.model.by_kernels import gpu_norm, gpu_tokens, tpu_sizes
from mixer_jax.model.layers import Gelu, LayerNorm, Stem, product_for
from mixer_jax.model.parameters import unstack
from mixer_jax.model.variants import Widths, check_image_size

Remat = Literal["none", "dots", "mlp_hidden", "full"]

# What the backward pass keeps of a block beside the block's input.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp_hidden": jax.checkpoint_policies.save_only_these_names("mlp_output"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MlpMixer(nn.Module):
    """The whole model: stem, blocks, LayerNorm, mean over tokens, linear head.

    Parameters are float32 and the blocks' lie stacked under "blocks" on a leading axis of length
    `num_blocks`; a list of each block's is taken, too, and gives blocks in a row. Training with
    dropout or stochastic depth needs the random stream of that name:
    `model.apply(variables, images, train=True, rngs={"dropout": key, "stochastic_depth": key})`.

    Attributes:
        num_classes: outputs of the head; 0 returns features instead.
        gelu: "tanh" as the authors, "exact" as timm.
        stochastic_depth: drop probability p of the last block; block i has p·i/(N−1).
        dropout: after each dense layer of the MLPs.
        head_bias: initial value of the head's bias.
        dtype: of the computation; LayerNorm statistics and the head are float32 throughout.
        unroll: blocks laid out one after the other per iteration of a loop; 0: all, and no loop.
        remat: what the backward pass recomputes: "none"; "dots", all but matrix products;
            "mlp_hidden", the hidden activations of the MLPs; "full", whole blocks.
        kernels: what computes the blocks: "xla", all by the compiler; "triton", hand-written
            kernels for GPUs; "mosaic", for TPUs. These two take the images of one device; with
            dropout, training takes "xla" all the same.
        for_cpu: as of `MixerBlock`; None: where the device is a CPU.
        device_kind: of the device that the model is compiled for, as JAX names it; empty: of the
            first one here.
        interpret: whether kernels run without the device that they are for, slowly.
    """

    num_classes: int
    num_blocks: int
    patch_size: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: Gelu = "tanh"
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    head_bias: float = 0.0
    dtype: Any = jnp.float32
    unroll: int = 0
    remat: Remat = "none"
    kernels: Kernels = "xla"
    for_cpu: bool | None = None
    device_kind: str = ""
    interpret: bool = False

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "n h w 3"],
        train: bool = False,
        places: Int[Array, " n"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Returns float32 logits, or features of `hidden_dim` channels if `num_classes` is 0.

        Args:
            images: pixels in [-1, 1].
            train: whether dropout and stochastic depth are active.
            places: of the images in the whole batch, where these are only a part of it: what is
                dropped of an image follows from its place; None: 0 to n − 1.

        Raises:
            UserError: height or width is not a multiple of the patch size.
        """
        _, height, width, _ = images.shape
        check_image_size(height, width, self.patch_size)
        places = jnp.arange(images.shape[0]) if places is None else places
        # The parameters are the same, and plain modules make them.
        kernels = "xla" if self.is_initializing() else self.computed_by(train)
        on_gpu = kernels == "triton"
        product = product_for(self.is_for_cpu(), train)
        stem = Stem(self.hidden_dim, self.patch_size, self.dtype, on_gpu, product, name="stem")
        norm = LayerNorm(name="pre_head_layer_norm")
        x = stem(images)
        if on_gpu:
            x = gpu_tokens(x, drops=train and self.stochastic_depth > 0)
            x = self.mix(x, places, train, kernels)
            x = gpu_norm(self.variables["params"]["pre_head_layer_norm"], x, self.interpret)
            x = jnp.swapaxes(x, 0, 1)
        else:
            x = self.mix(x, places, train, kernels)
            x = norm(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        if self.num_classes == 0:
            return x
        bias_init = nn.initializers.constant(self.head_bias)
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=zeros, bias_init=bias_init, name="head")(x)

    def computed_by(self, train: bool) -> Kernels:
        """Returns what computes the blocks: kernels of our own know no dropout."""
        return "xla" if train and self.dropout else self.kernels

    def mix(self, x: Any, places: Int[Array, " n"], train: bool, kernels: Kernels) -> Any:
        """Returns the tokens after all blocks, in a loop or one block after the other.

        The parameters lie stacked all the same. Keys are dealt to blocks here, so that what is
        dropped does not depend on `unroll`.

        Args:
            x: as the blocks take it.
            places: of the images.
            train: whether dropout and stochastic depth are active.
            kernels: that compute the blocks.
        """
        settings = {
            "gelu": self.gelu,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth > 0,
            "dtype": self.dtype,
            "for_cpu": self.is_for_cpu(),
            "kernels": kernels,
            "sizes": self.sizes(x.shape[1]) if kernels == "mosaic" else None,
            "interpret": self.interpret,
        }
        widths = (self.tokens_mlp_dim, self.channels_mlp_dim)
        if self.is_initializing():
            stack = nn.scan(
                MixerBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.num_blocks,
            )
            return stack(*widths, **settings, name="blocks")(x, self.drop_rates(), places, False)[0]
        block = MixerBlock(*widths, **settings, parent=None)
        streams = {"dropout": self.dropout, "stochastic_depth": self.stochastic_depth}
        keys = {
            name: jax.random.split(self.make_rng(name), self.num_blocks)
            for name, rate in streams.items()
            if train and rate
        }
        blocks = self.variables["params"]["blocks"]
        in_loop = 0 < self.unroll < self.num_blocks and not isinstance(blocks, list)

        def apply(x: Any, of_block: Any) -> tuple[Any, None]:
            params, rate, rngs = of_block
            return block.apply({"params": params}, x, rate, places, train, rngs=rngs)

        if self.remat != "none":
            # In a loop the compiler cannot undo the recomputation, so it needs no barrier.
            policy = REMAT_POLICIES[self.remat]
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=not in_loop)
        if in_loop:
            of_blocks = (blocks, self.drop_rates(), keys)
            return jax.lax.scan(apply, x, of_blocks, unroll=self.unroll)[0]
        # Traced and lowered once for all blocks; the compiler puts each in its place.
        apply = jax.jit(apply)
        for number, params in enumerate(unstack(blocks)):
            of_number = jax.tree.map(operator.itemgetter(number), (self.drop_rates(), keys))
            x, _ = apply(x, (params, *of_number))
        return x

    def is_for_cpu(self) -> bool:
        """Returns whether the program is arranged as a CPU wants it."""
        kind = self.device_kind or jax.devices()[0].device_kind
        return kind == "cpu" if self.for_cpu is None else self.for_cpu

    def sizes(self, tokens: int) -> Any:
        """Returns how a TPU's kernels divide their work, for images of so many tokens."""
        widths = Widths(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Widths)})
        itemsize = jnp.dtype(self.dtype).itemsize
        return tpu_sizes(tokens, widths, self.device_kind, itemsize, self.interpret)

    def drop_rates(self) -> Float[Array, " num_blocks"]:
        """Returns each block's drop probability, rising linearly from 0 to `stochastic_depth`."""
        return jnp.linspace(0.0, self.stochastic_depth, self.num_blocks, dtype=jnp.float32)
