"""Layouts of published ViT weights. Does not import JAX."""

import dataclasses
from collections.abc import Iterator

from mixer_jax.models.family import Axes, TensorMapping, WeightLayout

_LEAVES = ("kernel", "bias")
_NORM_LEAVES = ("scale", "bias")
_DENSES = ("Dense_0", "Dense_1")
# Axes of a matrix in PyTorch, and of kernels and biases with merged heads: those of query, key and
# value have axes (features, heads, channels), those of the output (heads, channels, features).
_TRANSPOSED: Axes = (1, 0)
_INPUT_AXES: dict[str, Axes] = {"kernel": ((1, 2), 0), "bias": ((0, 1),)}
_OUTPUT_KERNEL_AXES: Axes = (2, (0, 1))


def _google_block(name: str, path: str) -> Iterator[TensorMapping]:
    """Maps a block; its submodules are numbered together, as by Flax before Linen."""
    for norm, ours in (("LayerNorm_0", "LayerNorm_0"), ("LayerNorm_2", "LayerNorm_1")):
        for leaf in _NORM_LEAVES:
            yield TensorMapping(f"{name}/{norm}/{leaf}", f"{path}/{ours}/{leaf}")
    yield from _google_attention(f"{name}/MultiHeadDotProductAttention_1", f"{path}/attention")
    yield from _google_mlp(f"{name}/MlpBlock_3", f"{path}/mlp")


def _google_attention(name: str, path: str) -> Iterator[TensorMapping]:
    for projection in ("query", "key", "value", "out"):
        for leaf in _LEAVES:
            yield TensorMapping(f"{name}/{projection}/{leaf}", f"{path}/{projection}/{leaf}")


def _google_mlp(name: str, path: str) -> Iterator[TensorMapping]:
    for dense in _DENSES:
        for leaf in _LEAVES:
            yield TensorMapping(f"{name}/{dense}/{leaf}", f"{path}/{dense}/{leaf}")


def _google_tensors(block: str, pos_embedding: TensorMapping) -> tuple[TensorMapping, ...]:
    """Maps all tensors of a layout of Google's.

    Args:
        block: Name of a block, with {} for its index if there is a tensor for each.
        pos_embedding: Mapping of the position embedding.
    """
    renames = {
        "stem": "embedding",
        "encoder_norm": "Transformer/encoder_norm",
        "map_head/LayerNorm_0": "MAPHead_0/LayerNorm_0",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    outer = (
        TensorMapping(f"{name}/{leaf}", f"{path}/{leaf}")
        for path, name in renames.items()
        for leaf in (_NORM_LEAVES if "orm" in path else _LEAVES)
    )
    return (
        TensorMapping("cls", "cls"),
        pos_embedding,
        *_google_block(block, "blocks"),
        TensorMapping("MAPHead_0/probe", "map_head/probe"),
        *_google_attention("MAPHead_0/MultiHeadDotProductAttention_0", "map_head/attention"),
        *_google_mlp("MAPHead_0/MlpBlock_0", "map_head/mlp"),
        *outer,
    )


def _timm_tensors() -> Iterator[TensorMapping]:
    yield TensorMapping("cls_token", "cls")
    yield TensorMapping("pos_embed", "pos_embedding")
    yield TensorMapping("patch_embed.proj.weight", "stem/kernel", (3, 2, 0, 1))
    yield TensorMapping("patch_embed.proj.bias", "stem/bias")
    yield from _timm_norm("blocks.{}.norm1", "blocks/LayerNorm_0")
    yield from _timm_norm("blocks.{}.norm2", "blocks/LayerNorm_1")
    yield from _timm_inputs("blocks.{}.attn.qkv", "blocks/attention", "query", "key", "value")
    yield from _timm_output("blocks.{}.attn.proj", "blocks/attention/out")
    yield from _timm_mlp("blocks.{}.mlp", "blocks/mlp")
    yield from _timm_norm("norm", "encoder_norm")
    yield TensorMapping("attn_pool.latent", "map_head/probe")
    yield from _timm_inputs("attn_pool.q", "map_head/attention", "query")
    yield from _timm_inputs("attn_pool.kv", "map_head/attention", "key", "value")
    yield from _timm_output("attn_pool.proj", "map_head/attention/out")
    yield from _timm_norm("attn_pool.norm", "map_head/LayerNorm_0")
    yield from _timm_mlp("attn_pool.mlp", "map_head/mlp")
    yield from _timm_dense("head", "head")


def _timm_norm(name: str, path: str) -> Iterator[TensorMapping]:
    yield TensorMapping(f"{name}.weight", f"{path}/scale")
    yield TensorMapping(f"{name}.bias", f"{path}/bias")


def _timm_dense(name: str, path: str) -> Iterator[TensorMapping]:
    yield TensorMapping(f"{name}.weight", f"{path}/kernel", _TRANSPOSED)
    yield TensorMapping(f"{name}.bias", f"{path}/bias")


def _timm_mlp(name: str, path: str) -> Iterator[TensorMapping]:
    for index, dense in enumerate(_DENSES, 1):
        yield from _timm_dense(f"{name}.fc{index}", f"{path}/{dense}")


def _timm_inputs(name: str, path: str, *projections: str) -> Iterator[TensorMapping]:
    """Maps a layer that computes several of query, key and value."""
    for leaf, axes in _INPUT_AXES.items():
        paths = tuple(f"{path}/{projection}/{leaf}" for projection in projections)
        yield TensorMapping(f"{name}.{'weight' if leaf == 'kernel' else leaf}", paths, axes)


def _timm_output(name: str, path: str) -> Iterator[TensorMapping]:
    yield TensorMapping(f"{name}.weight", f"{path}/kernel", _OUTPUT_KERNEL_AXES)
    yield TensorMapping(f"{name}.bias", f"{path}/bias")


# Linen numbers submodules of a block by their type.
_LINEN_NAMES = (
    (r"(Transformer/encoderblock(_\d+)?)/LayerNorm_1/", r"\1/LayerNorm_2/"),
    (
        r"(Transformer/encoderblock(_\d+)?)/MultiHeadDotProductAttention_0/",
        r"\1/MultiHeadDotProductAttention_1/",
    ),
    (r"(Transformer/encoderblock(_\d+)?)/MlpBlock_0/", r"\1/MlpBlock_3/"),
)
_HYBRID = "belongs to a ResNet-ViT hybrid (R50, R26), which is not supported. Use a plain ViT."
_REJECTED = {"conv_root/kernel": _HYBRID, "block1/unit1/conv1/kernel": _HYBRID}
_BLOCK, _STACKED_BLOCK = "Transformer/encoderblock_{}", "Transformer/encoderblock"
_MLP_KERNEL = "MlpBlock_3/Dense_0/kernel"

# The position embedding has an entry for the class token, if there is one: the first.
GOOGLE = WeightLayout(
    "Google",
    _google_tensors(
        _BLOCK, TensorMapping("Transformer/posembed_input/pos_embedding", "pos_embedding")
    ),
    ("Transformer/posembed_input/pos_embedding",),
    "tanh",
    "resize",
    aliases=_LINEN_NAMES,
    rejected=_REJECTED,
)
_BIG_VISION = WeightLayout(
    "big_vision",
    _google_tensors(_BLOCK, TensorMapping("pos_embedding", "pos_embedding")),
    (f"{_BLOCK.format(0)}/{_MLP_KERNEL}",),
    "tanh",
    "shorter_side",
    aliases=_LINEN_NAMES,
    rejected=_REJECTED,
)
_BIG_VISION_STACKED = dataclasses.replace(
    _BIG_VISION,
    name="big_vision, stacked",
    tensors=_google_tensors(_STACKED_BLOCK, TensorMapping("pos_embedding", "pos_embedding")),
    signature_keys=(f"{_STACKED_BLOCK}/{_MLP_KERNEL}",),
)


def _with_class_token(layout: WeightLayout, block: str) -> WeightLayout:
    """Returns a layout of big_vision's models with a class token.

    They add the position embedding before they prepend the class token, which thus has no entry:
    the model is the same with an entry of zeros.
    """
    pos_embedding = TensorMapping("pos_embedding", "pos_embedding", start=1)
    return dataclasses.replace(
        layout,
        name=f"{layout.name}, class token",
        tensors=_google_tensors(block, pos_embedding),
        signature_keys=(*layout.signature_keys, "cls"),
    )


TIMM = WeightLayout(
    "timm",
    tuple(_timm_tensors()),
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "exact",
    "bicubic",
    eval_crop_fractions={0: 0.9, 384: 1.0},
    rejected={
        "fc_norm.weight": "normalizes the mean of the tokens; pooling=gap takes the mean of "
        "normalized tokens, which is another function. Use weights with global_pool='token' or "
        "'map'.",
    },
    # timm has no fixed position embedding.
    required=frozenset({"pos_embedding"}),
)
# In this order: the names of big_vision's layouts also occur in files of Google's.
LAYOUTS = (
    GOOGLE,
    _with_class_token(_BIG_VISION, _BLOCK),
    _BIG_VISION,
    _with_class_token(_BIG_VISION_STACKED, _STACKED_BLOCK),
    _BIG_VISION_STACKED,
    TIMM,
)
