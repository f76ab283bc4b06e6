"""The library timm, imported so that it works beside any build of PyTorch."""

from types import ModuleType
from typing import Any

import torch

from mixer_jax.models.mixer_config import VARIANTS


def import_timm() -> ModuleType:
    """Returns timm, with its models and transforms."""
    try:
        import torchvision
    except RuntimeError:
        # torchvision's compiled operators do not load beside another build of PyTorch than their
        # own. On its way in, it asks for these two only, which timm never calls.
        schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    import timm
    import timm.data
    import timm.models

    return timm


def create_timm_mixer(variant: str, image_size: int, num_classes: int) -> Any:
    """Returns timm's model of a variant, as its users have it, with fresh weights.

    Args:
        variant: a name of `VARIANTS`.
        image_size: pixels.
        num_classes: of the head.
    """
    timm = import_timm()
    name = f"mixer_{variant.lower().replace('/', '')}_224"
    if name in timm.list_models():
        return timm.create_model(name, img_size=image_size, num_classes=num_classes)
    from timm.models.mlp_mixer import MlpMixer

    widths = VARIANTS[variant]
    # timm has the widths of the MLPs as multiples of the channels.
    ratios = (
        widths.tokens_mlp_dim / widths.hidden_dim,
        widths.channels_mlp_dim / widths.hidden_dim,
    )
    return MlpMixer(
        num_classes=num_classes,
        img_size=image_size,
        patch_size=widths.patch_size,
        num_blocks=widths.num_blocks,
        embed_dim=widths.hidden_dim,
        mlp_ratio=ratios,
    )
