"""Baseline in JAX: the same BiT-ResNet in straightforward Flax, without any optimization."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mixer_jax.models.bit_config import ROOTS, BitConfig, num_groups


class _StdConv(nn.Module):
    features: int
    size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", nn.initializers.lecun_normal(), shape))
        mean = kernel.mean((0, 1, 2), keepdims=True)
        variance = kernel.var((0, 1, 2), keepdims=True)
        kernel = (kernel - mean) / jnp.sqrt(variance + 1e-10)
        return lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            2 * [(self.size // 2, self.size // 2)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class _Unit(nn.Module):
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def norm_relu(x: Array, name: str) -> Array:
            return nn.relu(_group_norm(x, self.dtype, name))

        outputs = 4 * self.width
        y = norm_relu(x, "norm1")
        if self.stride > 1 or x.shape[-1] != outputs:
            x = _StdConv(outputs, 1, self.stride, self.dtype, name="conv_proj")(y)
        y = _StdConv(self.width, 1, 1, self.dtype, name="conv1")(y)
        y = _StdConv(self.width, 3, self.stride, self.dtype, name="conv2")(norm_relu(y, "norm2"))
        return x + _StdConv(outputs, 1, 1, self.dtype, name="conv3")(norm_relu(y, "norm3"))


class _Block(nn.Module):
    num_units: int
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index in range(self.num_units):
            stride = self.stride if index == 0 else 1
            x = _Unit(self.width, stride, self.dtype, name=f"unit{index + 1:02}")(x)
        return x


class Reference(nn.Module):
    """BiT-ResNet with Flax's GroupNorm, whose gradients are derived automatically.

    Computes the function of `BitResNet` from the same parameters.
    """

    config: BitConfig
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Computes float32 logits from images in [-1, 1]."""
        config = self.config
        size, stride = ROOTS[config.root]
        x = _StdConv(config.root_width, size, stride, self.dtype, name="stem")(images)
        if stride == 2:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, (3, 3), (2, 2))
        for index, num_units in enumerate(config.units_per_block):
            width, stride = config.middle_width(index), 2 if index else 1
            x = _Block(num_units, width, stride, self.dtype, name=f"block{index + 1}")(x)
        x = jnp.mean(nn.relu(_group_norm(x, self.dtype, "norm")), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)


def _group_norm(x: Array, dtype: Any, name: str) -> Array:
    groups = num_groups(x.shape[-1])
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)(x)
