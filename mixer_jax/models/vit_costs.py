"""Costs of training a ViT: activations, recomputation, memory traffic. Does not import JAX."""

from mixer_jax.models.family import Traffic
from mixer_jax.models.vit_config import VitConfig, num_tokens

_FLOAT32 = 4
STEM, ATTENTION, MLP, LAYER_NORM, HEAD = "stem", "attention", "MLP", "LayerNorm", "head and loss"
# Patterns of the regions' operations in compiled programs.
REGIONS = {
    STEM: r"\bstem\b|\bimage\b|pos_embedding",
    HEAD: r"\b(head|map_head|pre_logits|loss|label)\b|log_sigmoid|log_softmax",
    ATTENTION: "attention",
    MLP: r"\bmlp\b",
    LAYER_NORM: "LayerNorm|layer_norm|encoder_norm",
}


def recomputed_flops(config: VitConfig, image_size: int, remat: str) -> int:
    """Returns the FLOPs per image that a remat policy recomputes, counting matmuls only."""
    tokens, width = num_tokens(config, image_size), config.hidden_dim
    # Scores, or the weighted mean of the values.
    attention = 2 * tokens**2 * width
    # The first matmul of the MLP.
    hidden = 2 * tokens * width * config.mlp_dim
    projections = 4 * 2 * tokens * width**2
    # The gradient of attention recomputes the logits under every policy, also in the MAP head,
    # which has one query.
    in_head = 2 * tokens * width if config.pooling == "map" else 0
    per_block = {
        "none": attention,
        "dots": attention,
        "mlp_hidden": attention + hidden,
        # The output of the MLP is the input of the next block, which is saved.
        "full": attention + projections + 2 * attention + hidden,
    }[remat]
    return config.num_blocks * per_block + in_head


def saved_activation_bytes(config: VitConfig, image_size: int, remat: str, itemsize: int) -> float:
    """Returns the bytes of residuals saved for the backward pass, per image, in all blocks."""
    tokens = num_tokens(config, image_size)
    x, hidden = tokens * config.hidden_dim, tokens * config.mlp_dim
    # The log-sum-exp of the attention logits over keys.
    logsumexp = _FLOAT32 * config.num_heads * tokens
    per_block = {
        # The input of both LayerNorms and their output, queries, keys, values, their weighted mean;
        # hidden units before and after GELU.
        "none": itemsize * (8 * x + 2 * hidden) + logsumexp,
        # The block's input, the outputs of its six matmuls with parameters, the weighted mean.
        "dots": itemsize * (7 * x + hidden) + logsumexp,
        # The block's input, queries, keys, values, their weighted mean, the output of attention.
        "mlp_hidden": itemsize * 6 * x + logsumexp,
        "full": itemsize * x,
    }[remat]
    return config.num_blocks * per_block


def live_block_bytes(config: VitConfig, image_size: int, itemsize: int) -> float:
    """Returns the bytes that are live in the middle of one block, per image."""
    tokens = num_tokens(config, image_size)
    x, hidden = tokens * config.hidden_dim, tokens * config.mlp_dim
    # Scores, weights and their gradients, in float32.
    in_attention = itemsize * 8 * x + 3 * _FLOAT32 * config.num_heads * tokens**2
    in_mlp = itemsize * (4 * x + 3 * hidden)
    return max(in_attention, in_mlp) + _FLOAT32 * 2 * x


def estimate_traffic(
    config: VitConfig,
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
    tokens, width, blocks = num_tokens(config, image_size), config.hidden_dim, config.num_blocks
    patches = tokens - config.has_class_token
    x = tokens * width * itemsize  # Bytes of the tokens.

    def weight_bytes(num_weights: int, num_reads: int, itemsize: int = itemsize) -> float:
        per_weight = num_reads * itemsize + (_FLOAT32 if train else 0)
        return num_weights * per_weight / batch_size

    # The gradient of the image, which is uint8, is not computed.
    passes = 2 if train else 1
    num_weights = 3 * config.patch_size**2 * width
    stem_flops = 2.0 * passes * num_weights * patches
    stem_bytes = passes * (3 * image_size**2 + x) + weight_bytes(num_weights, 1)

    passes, reads = (3, 2) if train else (1, 1)
    num_weights = width * num_classes + (width**2 if config.pre_logits else 0)
    head_flops = 2.0 * passes * num_weights
    head_bytes = passes * x + weight_bytes(num_weights, reads, _FLOAT32)
    if config.pooling == "map":
        num_weights = 4 * width**2 + 2 * width * config.mlp_dim
        head_flops += passes * 2.0 * (2 * tokens * width**2 + 2 * tokens * width)
        head_bytes += passes * 2 * x + weight_bytes(num_weights, reads)
    attention_weight_bytes = weight_bytes(blocks * 4 * width**2, reads)
    mlp_weight_bytes = weight_bytes(blocks * 2 * width * config.mlp_dim, reads)
    return {
        STEM: Traffic(stem_flops, stem_bytes, stem_flops, stem_bytes),
        ATTENTION: _attention_traffic(config, tokens, itemsize, train, attention_weight_bytes),
        MLP: _mlp_traffic(config, tokens, itemsize, train, mlp_weight_bytes),
        LAYER_NORM: Traffic(0.0, 0.0, 0.0, 0.0),  # Fused into the matmuls.
        HEAD: Traffic(head_flops, head_bytes, head_flops, head_bytes),
    }


def _attention_traffic(
    config: VitConfig, tokens: int, itemsize: int, train: bool, weight_bytes: float
) -> Traffic:
    """Returns the traffic of the attention branches of all blocks."""
    blocks, width = config.num_blocks, config.hidden_dim
    x = blocks * tokens * width * itemsize
    logits = blocks * config.num_heads * tokens**2 * itemsize
    out_projection = 2.0 * blocks * tokens * width**2
    flops = 4 * out_projection + 4.0 * blocks * tokens**2 * width
    if not train:
        # Three projections read the input and write; queries and keys are read and logits written;
        # logits and values are read and their mean written; it and the residual are read, and the
        # output written.
        unfused = 12 * x + 2 * logits + weight_bytes
        return Traffic(flops, unfused, flops, 2 * x + weight_bytes)
    # In the backward pass, the gradient of the output is read by two matmuls and the residual, the
    # mean by one, and its gradient written: five arrays. Six more are read and three written by the
    # gradients of attention, in addition to weights (read thrice) and their gradient (written, read
    # twice). Six are read for gradients of kernels, three read and three written for the input.
    unfused = (12 + 26) * x + (2 + 6) * logits + weight_bytes
    # In the backward pass, two arrays are read and one is written; all but the last matmul of the
    # forward pass is recomputed.
    return Traffic(3 * flops, unfused, 4 * flops - out_projection, (2 + 3) * x + weight_bytes)


def _mlp_traffic(
    config: VitConfig, tokens: int, itemsize: int, train: bool, weight_bytes: float
) -> Traffic:
    """Returns the traffic of the MLP branches of all blocks."""
    blocks, width = config.num_blocks, config.hidden_dim
    x = blocks * tokens * width * itemsize
    hidden = blocks * tokens * config.mlp_dim * itemsize
    flops = 2.0 * blocks * tokens * 2 * width * config.mlp_dim
    if not train:
        # Input, residual, output; hidden units written and read.
        return Traffic(flops, 3 * x + 2 * hidden + weight_bytes, flops, 2 * x + weight_bytes)
    # In the backward pass, the gradient of the output is read by two matmuls and the residual, the
    # input by one matmul and LayerNorm, and the gradient of the input is written: six arrays.
    # Hidden units are read by one matmul and by GELU's derivative; their gradient is written, and
    # read by two matmuls.
    unfused = (3 + 6) * x + (2 + 5) * hidden + weight_bytes
    # In the backward pass, two arrays are read and one is written. It recomputes the hidden units:
    # seven matmuls instead of six.
    return Traffic(3 * flops, unfused, 3 * flops * 7 / 6, (2 + 3) * x + weight_bytes)
