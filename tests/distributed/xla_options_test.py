"""Tests of compiler options: accepted by this version of XLA, and left out where they are not."""

import jax
import pytest

from mixer_jax.config.schema import FIELDS
from mixer_jax.distributed import xla_options


def test_options_exist_in_this_version() -> None:
    """A misspelled option, or one that XLA has removed, would be left out without a word."""
    tables = [*xla_options.PLATFORM_OPTIONS.values(), *xla_options.BACKEND_OPTIONS.values()]
    options = {name: value for table in tables for name, value in table.items()}
    assert len(options) >= 3
    assert [
        name for name, value in options.items() if not xla_options.is_supported(name, value)
    ] == []


def test_tables_name_platforms_and_backends() -> None:
    assert xla_options.PLATFORM_OPTIONS.keys() <= {"cpu", "gpu", "tpu"}
    assert xla_options.BACKEND_OPTIONS.keys() <= {*FIELDS["model.backend"].choices}


def test_compiler_options_depend_on_platform_and_backend() -> None:
    assert xla_options.compiler_options("cpu", "xla") == {}
    assert xla_options.compiler_options("tpu", "xla") == {}
    gpu = xla_options.compiler_options("gpu", "xla")
    triton = xla_options.compiler_options("gpu", "triton")
    assert gpu["xla_gpu_enable_triton_gemm"] is False
    assert gpu.items() < triton.items()
    assert triton["xla_disable_hlo_passes"]


@pytest.mark.parametrize(
    ("name", "value"), [("xla_gpu_removed_option", True), ("xla_gpu_enable_triton_gemm", "many")]
)
def test_compiler_options_leave_out_what_xla_rejects(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = xla_options.compiler_options("gpu", "triton")
    with pytest.raises(jax.errors.JaxRuntimeError, match=name):
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
    monkeypatch.setitem(xla_options.PLATFORM_OPTIONS["gpu"], name, value)
    actual = xla_options.compiler_options("gpu", "triton")
    assert actual == {key: option for key, option in expected.items() if key != name}
