"""Published layouts of Mixer weights: Google's npz files, and timm."""

import json
import math
from collections.abc import Iterator

from mixer_jax.models.mixer_config import VARIANTS, MixerConfig, param_shapes
from mixer_jax.models.weight_layout import TensorMapping, WeightLayout

# timm's named models have this image size; it has none of H/14.
_TIMM_IMAGE_SIZE = (224, 224)
_NOT_IN_TIMM = "H/14"
# Parameters under this path have a leading axis of blocks.
_BLOCKS = "blocks/"


def _google() -> Iterator[TensorMapping]:
    for path in ("stem", "pre_head_layer_norm", "head"):
        for leaf in ("scale" if "norm" in path else "kernel", "bias"):
            yield TensorMapping(f"{path}/{leaf}", f"{path}/{leaf}")
    for path in param_shapes(MixerConfig(1, 1, 1, 1, 1), 1, 0):
        if path.startswith(_BLOCKS):
            yield TensorMapping(path.replace(_BLOCKS, "MixerBlock_{}/"), path)


def _google_legacy() -> Iterator[TensorMapping]:
    for name, path in (
        ("embedding", "stem"),
        ("Mixer/encoder_norm", "pre_head_layer_norm"),
        ("head", "head"),
    ):
        for leaf in ("scale" if "norm" in path else "kernel", "bias"):
            yield TensorMapping(f"{name}/{leaf}", f"{path}/{leaf}")
    block = "Mixer/encoderblock_{}"
    for index, mixing in enumerate(("token_mixing", "channel_mixing")):
        for norm_leaf, dense_leaf in (("scale", "kernel"), ("bias", "bias")):
            norm = f"LayerNorm_{index}/{norm_leaf}"
            yield TensorMapping(f"{block}/{norm}", f"{_BLOCKS}{norm}")
            for dense in (0, 1):
                name = f"{block}/{mixing}_phase_0/{dense_leaf}{dense + 1}"
                yield TensorMapping(name, f"{_BLOCKS}{mixing}/Dense_{dense}/{dense_leaf}")


def _timm() -> Iterator[TensorMapping]:
    yield TensorMapping("stem.proj.weight", "stem/kernel", (3, 2, 0, 1))
    yield TensorMapping("stem.proj.bias", "stem/bias")
    block = "blocks.{}"
    for index, mixing in enumerate(("token_mixing", "channel_mixing")):
        norm = f"{block}.norm{index + 1}"
        yield TensorMapping(f"{norm}.weight", f"{_BLOCKS}LayerNorm_{index}/scale")
        yield TensorMapping(f"{norm}.bias", f"{_BLOCKS}LayerNorm_{index}/bias")
        for dense in (0, 1):
            name = f"{block}.mlp_{mixing.removesuffix('_mixing')}s.fc{dense + 1}"
            path = f"{_BLOCKS}{mixing}/Dense_{dense}"
            yield TensorMapping(f"{name}.weight", f"{path}/kernel", (1, 0))
            yield TensorMapping(f"{name}.bias", f"{path}/bias")
    yield TensorMapping("norm.weight", "pre_head_layer_norm/scale")
    yield TensorMapping("norm.bias", "pre_head_layer_norm/bias")
    yield TensorMapping("head.weight", "head/kernel", (1, 0))
    yield TensorMapping("head.bias", "head/bias")


GOOGLE = WeightLayout(
    "Google", tuple(_google()), ("pre_head_layer_norm/scale",), "tanh", "shorter_side"
)
# Some of its tensors have additional axes of length 1, which are dropped.
GOOGLE_LEGACY = WeightLayout(
    "Google, older names",
    tuple(_google_legacy()),
    ("Mixer/encoder_norm/scale",),
    "tanh",
    "shorter_side",
)
TIMM = WeightLayout("timm", tuple(_timm()), ("stem.proj.weight",), "exact", "bicubic")
LAYOUTS = (GOOGLE, GOOGLE_LEGACY, TIMM)


def timm_code(
    variant: str,
    config: MixerConfig,
    image_size: tuple[int, int],
    num_classes: int,
    gelu: str,
    path: str,
) -> list[str]:
    """Returns lines of Python that load weights in timm's layout; see `ModelFamily.timm_code`."""
    file = json.dumps(path, ensure_ascii=False)
    # timm's default GELU is exact.
    act_layer = ["act_layer=timm.layers.GELUTanh"] if gelu == "tanh" else []
    is_named = variant != _NOT_IN_TIMM and VARIANTS.get(variant) == config
    if is_named and image_size == _TIMM_IMAGE_SIZE:
        name = f"mixer_{variant.replace('/', '').lower()}_{_TIMM_IMAGE_SIZE[0]}"
        args = [f'"{name}"', f"num_classes={num_classes}", f"checkpoint_path={file}", *act_layer]
        return ["import timm", f"model = timm.create_model({', '.join(args)})"]
    height, width = image_size
    mlp_dims = (config.tokens_mlp_dim, config.channels_mlp_dim)
    args = [
        f"num_classes={num_classes}",
        f"img_size={height if height == width else (height, width)}",
        f"patch_size={config.patch_size}",
        f"num_blocks={config.num_blocks}",
        f"embed_dim={config.hidden_dim}",
        f"mlp_ratio=({', '.join(_timm_mlp_ratio(dim, config.hidden_dim) for dim in mlp_dims)})",
        *act_layer,
    ]
    return [
        "import timm",
        f"model = timm.models.mlp_mixer.MlpMixer({', '.join(args)})",
        f"timm.models.load_checkpoint(model, {file})",
    ]


def _timm_mlp_ratio(mlp_dim: int, hidden_dim: int) -> str:
    """Returns an expression that timm multiplies by `hidden_dim` and truncates to `mlp_dim`."""
    is_exact = math.floor(mlp_dim / hidden_dim * hidden_dim) == mlp_dim
    return f"{mlp_dim if is_exact else mlp_dim + 0.5} / {hidden_dim}"
