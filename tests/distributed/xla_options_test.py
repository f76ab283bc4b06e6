"""Tests of compiler options: known to this XLA, given where they belong, dropped where unknown."""

import pytest

from mixer_jax.distributed import xla_options


def test_options_are_for_their_platform_and_exist_in_this_version() -> None:
    assert xla_options.compiler_options("cpu", "xla") == {}
    assert xla_options.PLATFORM_OPTIONS["gpu"]
    assert xla_options.compiler_options("gpu", "xla") == xla_options.PLATFORM_OPTIONS["gpu"]


def test_options_of_another_version_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = xla_options.PLATFORM_OPTIONS["gpu"]
    monkeypatch.setitem(
        xla_options.PLATFORM_OPTIONS, "gpu", known | {"xla_gpu_of_another_time": True}
    )
    assert xla_options.compiler_options("gpu", "xla") == known


def test_kernels_of_our_own_have_further_options() -> None:
    further = xla_options.BACKEND_OPTIONS["triton"]
    assert further
    assert (
        xla_options.compiler_options("gpu", "triton")
        == xla_options.PLATFORM_OPTIONS["gpu"] | further
    )
