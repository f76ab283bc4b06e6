"""Fixtures that import PyTorch and timm."""

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
    """The timm package."""
    from mixer_jax.benchmarks.torch_runner import import_timm

    return import_timm()
