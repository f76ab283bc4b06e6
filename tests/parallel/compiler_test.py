"""Tests of compiler options: known to this XLA, given where they belong, dropped where unknown."""

import pytest

from mixer_jax.parallel import compiler


def test_options_are_for_their_platform_and_exist_in_this_version() -> None:
    assert compiler.compiler_options("cpu", "xla") == {}
    assert compiler.OPTIONS["gpu"]
    assert compiler.compiler_options("gpu", "xla") == compiler.OPTIONS["gpu"]


def test_options_of_another_version_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compiler.OPTIONS["gpu"]
    monkeypatch.setitem(compiler.OPTIONS, "gpu", known | {"xla_gpu_of_another_time": True})
    assert compiler.compiler_options("gpu", "xla") == known


def test_kernels_of_our_own_have_further_options() -> None:
    further = compiler.KERNEL_OPTIONS["triton"]
    assert further
    assert compiler.compiler_options("gpu", "triton") == compiler.OPTIONS["gpu"] | further
