"""BiT-ResNet (Section 3.3 of arXiv 1912.11370): ResNetV2 of standardized convolutions, GroupNorm.

Pre-activation residual units (arXiv 1603.05027) with weight standardization (arXiv 1903.10520) and
GroupNorm (arXiv 1803.08494) instead of batch normalization: the output of an image depends on no
other image of its batch. Padding is symmetric, as in the authors' code.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixer_jax.models.bit_config import ROOTS, BitConfig, num_groups
from mixer_jax.models.execution import Execution, Remat
from mixer_jax.models.layers import Context, classifier_head
from mixer_jax.models.stack import make_context

# Those of the authors' code. timm adds 1e-8 to the variance of kernels: with random weights, logits
# differ by less than 1e-4 of their deviation.
STD_CONV_EPSILON = 1e-10
GROUP_NORM_EPSILON = 1e-5
# Tag of activations that rematerialization saves with the policy "dots".
_CONV_OUTPUT = "conv_output"
# Residuals saved for the backward pass besides each unit's input. The backward pass does not need
# the output of a unit's last convolution: to recompute all others is the same as everything.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(_CONV_OUTPUT),
    "mlp_hidden": jax.checkpoint_policies.nothing_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def standardize_kernel(kernel: Float[Array, "h w i o"]) -> Float[Array, "h w i o"]:
    """Shifts and scales the kernel of each output channel to mean 0 and variance 1, in float32.

    The derivative is written out: with the automatic one, XLA took CPUs about ten times as long
    for 1×1 kernels.
    """
    return _standardize_fwd(kernel)[0]


def _standardize_fwd(kernel: Array) -> tuple[Array, Any]:
    mean = kernel.astype(jnp.float32).mean((0, 1, 2), keepdims=True)
    centered = kernel.astype(jnp.float32) - mean
    rstd = lax.rsqrt(jnp.square(centered).mean((0, 1, 2), keepdims=True) + STD_CONV_EPSILON)
    return centered * rstd, (kernel, mean, rstd)


def _standardize_bwd(residuals: Any, cotangent: Array) -> tuple[Array]:
    kernel, mean, rstd = residuals
    normalized = (kernel.astype(jnp.float32) - mean) * rstd
    mean_of_cotangent = cotangent.mean((0, 1, 2), keepdims=True)
    mean_of_products = (cotangent * normalized).mean((0, 1, 2), keepdims=True)
    dkernel = rstd * (cotangent - mean_of_cotangent - normalized * mean_of_products)
    return (dkernel.astype(kernel.dtype),)


standardize_kernel.defvjp(_standardize_fwd, _standardize_bwd)


def convolve(
    x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"], stride: int
) -> Float[Array, "n h2 w2 o"]:
    """Convolves images padded by k // 2 zeros on all sides."""
    padding = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_on_cpu(
    x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"], stride: int
) -> Float[Array, "n h2 w2 o"]:
    """Convolves like `convolve`; 1×1 convolutions and the gradients of `x` are matmuls.

    XLA's own gradients transpose kernels and activations, which takes CPUs up to several times as
    long as the sums. The float32 results differ by rounding.
    """
    if len(kernel) > 1:
        return convolve(x, kernel, stride)
    x = x[:, ::stride, ::stride]
    return _dot(_to_rows(x), kernel[0, 0], 1, 0).reshape(*x.shape[:-1], -1)


def _convolve_fwd(x: Array, kernel: Array, stride: int) -> tuple[Array, Any]:
    return convolve_on_cpu(x, kernel, stride), (x, kernel)


def _convolve_bwd(stride: int, residuals: Any, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dy, matrix = _to_rows(cotangent), kernel.reshape(-1, kernel.shape[-1])
    dpatches = _dot(dy, matrix, 1, 1).reshape(*cotangent.shape[:3], -1)
    extract = functools.partial(_extract_patches, size=len(kernel), stride=stride)
    (dx,) = jax.linear_transpose(extract, x)(dpatches)
    if len(kernel) == 1:
        return dx, _dot(_to_rows(x[:, ::stride, ::stride]), dy, 0, 0)[None, None]
    convolve_x = functools.partial(convolve, x, stride=stride)
    return dx, *jax.linear_transpose(convolve_x, kernel)(cotangent)


convolve_on_cpu.defvjp(_convolve_fwd, _convolve_bwd)


def _extract_patches(x: Array, size: int, stride: int) -> Array:
    """Gathers the inputs of each output of a convolution, (n, h2, w2, size * size * i)."""
    _, height, width, _ = x.shape
    margins = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), margins, margins, (0, 0)))
    offsets = [(i, j) for i in range(size) for j in range(size)]
    patches = [x[:, i : i + height : stride, j : j + width : stride] for i, j in offsets]
    return jnp.concatenate(patches, axis=-1)


def _to_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Multiplies two matrices by a sum over an axis of each."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def group_norm(
    x: Float[Array, "n h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int
) -> Float[Array, "n h w c"]:
    """Applies GroupNorm, with statistics in float32; the variance is a mean of squared deviations.

    Residuals are `x`, and the mean and inverse standard deviation of each group.
    """
    return _group_norm_fwd(x, scale, bias, groups)[0]


def _group_norm_fwd(x: Array, scale: Array, bias: Array, groups: int) -> tuple[Array, Any]:
    mean = _mean_over_groups(x.astype(jnp.float32).mean((1, 2)), groups)
    centered = x.astype(jnp.float32) - mean
    variance = _mean_over_groups(jnp.square(centered).mean((1, 2)), groups)
    rstd = lax.rsqrt(variance + GROUP_NORM_EPSILON)
    scale, bias = (vector[None, None, None, :] for vector in (scale, bias))
    return (centered * (rstd * scale) + bias).astype(x.dtype), (x, mean, rstd, scale)


def _group_norm_bwd(groups: int, residuals: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    x, mean, rstd, scale = residuals
    cotangent = cotangent.astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * rstd
    sums, products = cotangent.sum((1, 2)), (cotangent * normalized).sum((1, 2))
    weight = scale[:, 0, 0, :] / (x.shape[1] * x.shape[2])
    mean_of_sums = _mean_over_groups(sums * weight, groups)
    mean_of_products = _mean_over_groups(products * weight, groups)
    dx = rstd * (cotangent * scale - mean_of_sums - normalized * mean_of_products)
    return dx.astype(x.dtype), products.sum(0), sums.sum(0)


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)


def _mean_over_groups(x: Float[Array, "n c"], groups: int) -> Float[Array, "n 1 1 c"]:
    """Averages over the channels of each group, and repeats the mean for each of them.

    Channels of large arrays are not split into groups, which accelerators would need a copy for.
    """
    n, channels = x.shape
    mean = x.reshape(n, groups, -1).mean(-1)
    return jnp.repeat(mean, channels // groups, axis=1)[:, None, None, :]


class GroupNorm(nn.Module):
    """GroupNorm over space and the channels of a group; the output has its input's dtype."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Normalizes each group of channels of each image."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, jnp.asarray(scale), jnp.asarray(bias), num_groups(channels))


class StdConv(nn.Module):
    """Convolution with a standardized kernel, without bias, padded by zeros on all sides."""

    features: int
    kernel_size: int
    stride: int
    ctx: Context

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        """Convolves images; their size is divided by the stride and rounded up."""
        size, dtype = self.kernel_size, self.ctx.dtype
        shape = (size, size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x, kernel = x.astype(dtype), standardize_kernel(kernel).astype(dtype)
        convolution = convolve_on_cpu if self.ctx.flatten_batch else convolve
        y = convolution(x, kernel, self.stride)
        return checkpoint_name(y, _CONV_OUTPUT)


class BottleneckUnit(nn.Module):
    """Pre-activation residual unit: 1×1, 3×3 and 1×1 convolutions with a skip connection.

    The stride is that of the 3×3 convolution. If the number of channels or the size changes, the
    skip connection is a 1×1 convolution of the activated input.
    """

    middle_width: int
    stride: int
    ctx: Context

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        """Applies the unit."""
        features = 4 * self.middle_width
        conv = functools.partial(StdConv, ctx=self.ctx)
        y = nn.relu(GroupNorm(name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != features:
            x = conv(features, 1, self.stride, name="conv_proj")(y)
        y = conv(self.middle_width, 1, 1, name="conv1")(y)
        y = nn.relu(GroupNorm(name="norm2")(y))
        y = conv(self.middle_width, 3, self.stride, name="conv2")(y)
        y = nn.relu(GroupNorm(name="norm3")(y))
        return x + conv(features, 1, 1, name="conv3")(y)


class ResNetBlock(nn.Module):
    """Bottleneck units of equal width, the first of which has the stride."""

    num_units: int
    middle_width: int
    stride: int
    remat: Remat
    ctx: Context

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        """Applies all units."""
        unit: Any = BottleneckUnit
        if self.remat != "none":
            unit = nn.remat(unit, policy=_REMAT_POLICIES[self.remat])
        for index in range(self.num_units):
            stride = self.stride if index == 0 else 1
            name = f"unit{index + 1:02}"
            x = unit(self.middle_width, stride, self.ctx, name=name)(x)
            self.sow("intermediates", f"{name}_output", x)
        return x


class BitResNet(nn.Module):
    """The whole model: root, blocks of units, GroupNorm, ReLU, mean over space, linear head.

    Attributes:
        config: Dimensions.
        num_classes: Outputs of the head; 0 returns features.
        head_bias: Initial value of the head's bias.
        execution: Execution settings, which do not change what the model computes. "dots" saves the
            outputs of convolutions.
    """

    family: ClassVar[str] = "bit"

    config: BitConfig
    num_classes: int
    head_bias: float = 0.0
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "n h w 3"],
        train: bool = False,
        example_index: Int[Array, " n"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Computes float32 logits, or features of `num_features` channels if `num_classes` is 0.

        Args:
            images: Pixels in [-1, 1], of any height and width.
            train: Without effect.
            example_index: Without effect.
        """
        del example_index
        config, ctx = self.config, make_context(self, train)
        kernel_size, stride = ROOTS[config.root]
        x = StdConv(config.root_width, kernel_size, stride, ctx, name="stem")(images)
        if stride == 2:
            # Padded by zeros, not by −∞: at the border, negative values become 0.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        self.sow("intermediates", "stem_output", x)
        for index, num_units in enumerate(config.units_per_block):
            stride, name = (1 if index == 0 else 2), f"block{index + 1}"
            width = config.middle_width(index)
            x = ResNetBlock(num_units, width, stride, self.execution.remat, ctx, name=name)(x)
            self.sow("intermediates", f"{name}_output", x)
        x = nn.relu(GroupNorm(name="norm")(x))
        self.sow("intermediates", "feature_map", x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        for name in ("pooled", "pre_logits"):
            self.sow("intermediates", name, x)
        return classifier_head(self.num_classes, self.head_bias)(x) if self.num_classes else x
