"""Costs of training a Mixer: activations, recomputation, memory traffic. Does not import JAX."""

from typing import NamedTuple

from mixer_jax.models.family import Traffic
from mixer_jax.models.mixer_config import MixerConfig, num_tokens

_FLOAT32 = 4
STEM, TOKEN_MIXING, CHANNEL_MIXING = "stem", "token mixing", "channel mixing"
LAYER_NORM, HEAD = "LayerNorm", "head and loss"
# Patterns of the regions' operations in compiled programs.
REGIONS = {
    STEM: r"\bstem\b|\bimage\b",
    # Only token mixing transposes its input.
    TOKEN_MIXING: r"token_mixing|block_\d+/transpose",
    CHANNEL_MIXING: "channel_mixing",
    LAYER_NORM: "LayerNorm|layer_norm",
    HEAD: r"\b(head|loss|label)\b|log_sigmoid|log_softmax",
}


def recomputed_flops(config: MixerConfig, image_size: int, remat: str) -> int:
    """Returns the FLOPs per image that a remat policy recomputes, counting matmuls only."""
    tokens_dim, channels_dim = config.tokens_mlp_dim, config.channels_mlp_dim
    # "mlp_hidden" saves the output of each MLP's second matmul. "full" saves none, but need not
    # recompute the last one: the next block saves its input.
    hidden_units = {
        "none": 0,
        "dots": 0,
        "mlp_hidden": tokens_dim + channels_dim,
        "full": 2 * tokens_dim + channels_dim,
    }[remat]
    # Each matmul of an MLP takes 2 * S * C FLOPs per hidden unit.
    return config.num_blocks * 2 * _input_size(config, image_size) * hidden_units


def saved_activation_bytes(
    config: MixerConfig, image_size: int, remat: str, itemsize: int
) -> float:
    """Returns the bytes of residuals saved for the backward pass, per image, in all blocks."""
    x, hidden = _input_size(config, image_size), _hidden_size(config, image_size)
    elements = {
        # The input of both LayerNorms and their output; hidden units before and after GELU.
        "none": 4 * x + 2 * hidden,
        # The block's input and the outputs of its four matmuls.
        "dots": 3 * x + hidden,
        "mlp_hidden": 3 * x,
        "full": x,
    }[remat]
    return config.num_blocks * itemsize * elements


def live_block_bytes(config: MixerConfig, image_size: int, itemsize: int) -> float:
    """Returns the bytes that are live in the middle of one block, per image."""
    x, hidden = _input_size(config, image_size), _hidden_size(config, image_size)
    return itemsize * (4 * x + 3 * hidden) + _FLOAT32 * 2 * x


def _input_size(config: MixerConfig, image_size: int) -> int:
    return num_tokens(config, image_size) * config.hidden_dim


def _hidden_size(config: MixerConfig, image_size: int) -> int:
    """Returns the number of hidden units of both MLPs of a block, per image."""
    tokens = num_tokens(config, image_size)
    return config.hidden_dim * config.tokens_mlp_dim + tokens * config.channels_mlp_dim


class _Step(NamedTuple):
    config: MixerConfig
    image_size: int
    num_classes: int
    batch_size: int
    itemsize: int
    train: bool

    @property
    def num_tokens(self) -> int:
        return num_tokens(self.config, self.image_size)

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens per image."""
        return self.num_tokens * self.config.hidden_dim * self.itemsize

    def num_weights(self, region: str) -> int:
        """Returns the number of elements of a region's kernels, in all blocks."""
        config, channels = self.config, self.config.hidden_dim
        return {
            STEM: 3 * config.patch_size**2 * channels,
            TOKEN_MIXING: config.num_blocks * 2 * self.num_tokens * config.tokens_mlp_dim,
            CHANNEL_MIXING: config.num_blocks * 2 * channels * config.channels_mlp_dim,
            HEAD: channels * self.num_classes,
        }[region]

    def weight_bytes(self, region: str, num_reads: int) -> float:
        """Returns the bytes per image of reading a region's kernels and writing their gradients.

        Each kernel is read by `num_reads` matmuls.
        """
        itemsize = _FLOAT32 if region == HEAD else self.itemsize
        per_weight = num_reads * itemsize + (_FLOAT32 if self.train else 0)
        return self.num_weights(region) * per_weight / self.batch_size


def estimate_traffic(
    config: MixerConfig,
    image_size: int,
    num_classes: int,
    *,
    batch_size: int,
    itemsize: int,
    train: bool,
) -> dict[str, Traffic]:
    """Estimates the traffic per region, step and image, without the optimizer.

    Kernels are read in the computation's dtype, once per matmul, those of the head in float32.
    Gradients of kernels are written in float32.
    """
    step = _Step(config, image_size, num_classes, batch_size, itemsize, train)
    # The gradient of the image, which is uint8, is not computed.
    passes = 2 if train else 1
    stem_bytes = passes * (3 * image_size**2 + step.token_bytes) + step.weight_bytes(STEM, 1)
    stem_flops = 2 * passes * step.num_weights(STEM) * step.num_tokens
    # The last LayerNorm and the mean read all tokens; the backward pass reads and writes them.
    passes = 3 if train else 1
    head_bytes = passes * step.token_bytes + step.weight_bytes(HEAD, 2 if train else 1)
    head_flops = 2 * passes * step.num_weights(HEAD)
    return {
        STEM: Traffic(stem_flops, stem_bytes, stem_flops, stem_bytes),
        TOKEN_MIXING: _mlp_traffic(step, TOKEN_MIXING),
        CHANNEL_MIXING: _mlp_traffic(step, CHANNEL_MIXING),
        LAYER_NORM: Traffic(0.0, 0.0, 0.0, 0.0),  # Fused into the matmuls.
        HEAD: Traffic(head_flops, head_bytes, head_flops, head_bytes),
    }


def _mlp_traffic(step: _Step, region: str) -> Traffic:
    """Returns the traffic of the token-mixing or the channel-mixing MLPs of all blocks."""
    config = step.config
    # A token-mixing MLP maps each channel, a channel-mixing MLP each token.
    if region == TOKEN_MIXING:
        num_vectors, mlp_dim = config.hidden_dim, config.tokens_mlp_dim
    else:
        num_vectors, mlp_dim = step.num_tokens, config.channels_mlp_dim
    x = config.num_blocks * step.token_bytes
    hidden = config.num_blocks * num_vectors * mlp_dim * step.itemsize
    forward_flops = 2.0 * step.num_weights(region) * num_vectors
    if not step.train:
        # Input, residual, output; hidden units written and read.
        unfused = 3 * x + 2 * hidden + step.weight_bytes(region, 1)
        fused = 2 * x + step.weight_bytes(region, 1)
        return Traffic(forward_flops, unfused, forward_flops, fused)
    # In the backward pass, the gradient of the output is read by two matmuls and the residual, the
    # input by one matmul and LayerNorm, and the gradient of the input is written: six arrays.
    # Hidden units are read by one matmul and by GELU's derivative; their gradient is written, and
    # read by two matmuls.
    unfused = (3 + 6) * x + (2 + 5) * hidden + step.weight_bytes(region, 2)
    # In the backward pass, two arrays are read and one is written.
    fused = (2 + 3) * x + step.weight_bytes(region, 2)
    # The backward pass recomputes the hidden units: seven matmuls instead of six.
    return Traffic(3 * forward_flops, unfused, 3 * forward_flops * 7 / 6, fused)
