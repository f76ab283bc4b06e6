"""PyTorch and timm, imported only by the tests that compare with them."""

import importlib.util
from typing import Any

import pytest


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("timm")):
        pytest.skip("PyTorch and timm are not installed; make test-baselines installs them")
    import torch

    return torch


@pytest.fixture(scope="session")
def timm(torch: Any) -> Any:
    """The library timm."""
    from mixer_jax.benchmarks.timm_library import import_timm

    return import_timm()
