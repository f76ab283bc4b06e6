"""Tests of compiler options: known to this XLA, given where they belong, dropped where unknown."""

import pytest

from mixer_jax.parallel import compiler


def test_options_are_for_their_platform_and_exist_in_this_version() -> None:
    assert compiler.compiler_options("cpu") == {}
    assert compiler.OPTIONS["gpu"]
    assert compiler.compiler_options("gpu") == compiler.OPTIONS["gpu"]


def test_options_of_another_version_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compiler.OPTIONS["gpu"]
    monkeypatch.setitem(compiler.OPTIONS, "gpu", known | {"xla_gpu_of_another_time": True})
    assert compiler.compiler_options("gpu") == known
