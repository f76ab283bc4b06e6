"""PyTorch and timm, imported only by the tests that compare with them."""

import importlib.util
from typing import Any

import pytest


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("timm")):
        pytest.skip("PyTorch and timm are not installed; make test-peers installs them")
    import torch

    return torch


@pytest.fixture(scope="session")
def timm(torch: Any) -> Any:
    """The library timm."""
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
