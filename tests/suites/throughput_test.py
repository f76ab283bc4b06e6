"""Tests of throughput where the device is too small."""

from typing import Any

import jax
import pytest

from mixer_jax.suites import throughput
from tests.helpers.random_weights import random_weights


def test_weights_that_do_not_fit_have_no_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "device_put", refuse)
    assert throughput.measure_throughput(random_weights()) == (0.0, 0, "cpu", (16, 16))
