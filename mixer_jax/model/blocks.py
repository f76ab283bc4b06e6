"""A Mixer's block: one MLP over tokens, one over channels, each mapped over all vectors."""

import functools
from typing import Any, Literal, cast

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixer_jax.model.by_kernels import Keep, gpu_block, tpu_block
from mixer_jax.model.dropping import draw_mask, draw_masks
from mixer_jax.model.layers import Gelu, LayerNorm, gelu, product_for

Kernels = Literal["xla", "triton", "mosaic"]


class MlpBlock(nn.Module):
    """Dense, GELU, dense: from a vector to one of its own width.

    The block knows nothing of images, tokens or channels: it is mapped over them.

    Attributes:
        dot_general: that computes products, as `nn.Dense` takes it. After `cpu_product` sums stay
            in float32, GELU's argument among them: but for products a CPU computes in nothing else,
            and would round after every operation.
    """

    mlp_dim: int
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    dot_general: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, " d"], place: Int[Array, ""], train: bool
    ) -> Float[Array, " d"]:
        """Returns the MLP's output, of its input's shape, in `dtype`; float32 by `cpu_product`.

        Args:
            x: a vector.
            place: of the vector among those of the whole batch; what is dropped follows from it.
            train: whether dropout is active.
        """
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general=self.dot_general)
        x = dense(self.mlp_dim)(x)
        x = gelu(x, self.gelu).astype(self.dtype)
        x = self.drop(x, place, train)
        x = dense(width)(x)
        return self.drop(x, place, train)

    def drop(self, x: Float[Array, " d"], place: Int[Array, ""], train: bool) -> Float[Array, " d"]:
        """Sets a share of the numbers to zero, and scales the others up to keep the mean."""
        if not (train and self.dropout):
            return x
        kept = draw_mask(self.make_rng("dropout"), place, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), 0.0).astype(x.dtype)


def map_mlp(axis: int | None) -> type[MlpBlock]:
    """Returns MlpBlock mapped over the first axis and, in what is left, over `axis`.

    All share one set of parameters.

    Args:
        axis: of the tokens (s, c) of an image: 0 gives the MLP tokens, 1 gives it channels. None:
            the first axis is all, rows of a matrix.
    """
    over = functools.partial(
        nn.vmap,
        variable_axes={"params": None},
        split_rngs={"params": False, "dropout": False},
    )
    one = MlpBlock if axis is None else over(MlpBlock, in_axes=(axis, 0, None), out_axes=axis)
    return cast(type[MlpBlock], over(one, in_axes=(0, 0, None)))


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each after LayerNorm and with a skip connection.

    Attributes:
        for_cpu: whether an MLP takes the vectors of all images as the rows of one matrix, and
            prediction takes `cpu_product`. A CPU's products want rows, to the last gradient; a TPU
            would move every array for them.
    """

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    stochastic_depth: bool = False
    dtype: Any = jnp.float32
    for_cpu: bool = False
    kernels: Kernels = "xla"
    sizes: Any = None
    interpret: bool = False

    @nn.compact
    def __call__(
        self,
        x: Any,
        drop_rate: Float[Array, ""],
        places: Int[Array, " n"],
        train: bool,
    ) -> tuple[Any, None]:
        """Returns the mixed tokens and, for `nn.scan`, no per-block output.

        Args:
            x: tokens of a batch of images, (n, s, c), or `Pending` ones for kernels that want them.
            drop_rate: probability of skipping each of the two branches for an image.
            places: of the images in their batch, as `MlpMixer` takes them.
            train: whether dropout and stochastic depth are active.
        """
        keep = (self.keep(drop_rate, places, train), self.keep(drop_rate, places, train))
        if self.kernels == "triton":
            params = self.variables["params"]
            return gpu_block(params, x, keep, self.gelu, self.interpret), None
        if self.kernels == "mosaic":
            params = self.variables["params"]
            return tpu_block(params, x, keep, self.gelu, self.sizes, self.interpret), None
        y = LayerNorm()(x)
        y = self.mix(y, 1, self.tokens_mlp_dim, "token_mixing", places, train)
        x = (x + kept(checkpoint_name(y, "mlp_output"), keep[0])).astype(self.dtype)
        y = LayerNorm()(x)
        y = self.mix(y, 0, self.channels_mlp_dim, "channel_mixing", places, train)
        return (x + kept(y, keep[1])).astype(self.dtype), None

    def mix(
        self,
        x: Float[Array, "n s c"],
        axis: int,
        mlp_dim: int,
        name: str,
        places: Int[Array, " n"],
        train: bool,
    ) -> Float[Array, "n s c"]:
        """Returns what one MLP makes of every vector; `axis` as of `map_mlp`."""
        settings = {"gelu": self.gelu, "dropout": self.dropout, "dtype": self.dtype, "name": name}
        settings["dot_general"] = product_for(self.for_cpu, train)
        number = x.shape[axis + 1]
        places = places[:, None] * number + jnp.arange(number)[None]
        if not self.for_cpu:
            return map_mlp(axis)(mlp_dim, **settings)(x, places, train)
        vectors = jnp.moveaxis(x, axis + 1, 1)
        rows = vectors.reshape(-1, vectors.shape[-1])
        rows = map_mlp(None)(mlp_dim, **settings)(rows, places.reshape(-1), train)
        return jnp.moveaxis(rows.reshape(vectors.shape), 1, axis + 1)

    def keep(self, drop_rate: Float[Array, ""], places: Int[Array, " n"], train: bool) -> Keep:
        """Draws which images keep a branch; None: all do."""
        if not (train and self.stochastic_depth):
            return None
        rng = self.make_rng("stochastic_depth")
        return draw_masks(rng, places, 1.0 - drop_rate, ()).astype(self.dtype)


def kept(branch: Float[Array, "n s c"], keep: Keep) -> Float[Array, "n s c"]:
    """Returns a branch, zero for images that drop it. It is not rescaled, as the authors did."""
    return branch if keep is None else keep[:, None, None] * branch
