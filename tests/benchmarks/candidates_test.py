"""Tests of candidates and workloads."""

import itertools
from typing import Any

from mixer_jax.benchmarks.candidates import (
    MIXER_JAX,
    Candidate,
    Workload,
    check_backends,
    our_candidates,
)
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.registry import get_family
from tests.helpers.messages import mentions, raises


def test_our_candidates_are_named_by_what_they_differ_in() -> None:
    choices: dict[str, list[Any]] = {
        "scan_unroll": [1, 0],
        "remat": ["none", "dots"],
        "gelu": ["exact"],
    }
    names = [candidate.name for candidate in our_candidates(choices)]
    assert len(set(names)) == 4
    settings = itertools.product(["1", "all"], ["none", "dots"])
    for name, (scan_unroll, remat) in zip(names, settings, strict=True):
        assert mentions(name, MIXER_JAX, "scan_unroll", scan_unroll, "remat", remat)
        assert "gelu" not in name
    (only,) = our_candidates({"scan_unroll": [0], "remat": ["none"]})
    assert only.name == MIXER_JAX


def test_remat_auto_is_named_if_scans_differ() -> None:
    # It means different policies.
    for candidate in our_candidates({"scan_unroll": [1, 0], "remat": ["auto"]}):
        assert mentions(candidate.name, "remat", "auto")


def test_flops_of_training_are_three_forward_passes() -> None:
    infer = Workload("infer", "S/32", 64, 10, "float32", 2)
    assert infer.flops == 2 * get_family("mixer").forward_flops(VARIANTS["S/32"], 64, 10)
    assert infer._replace(mode="train").flops == 3 * infer.flops


def test_check_backends_refuses_another_platform() -> None:
    candidate = Candidate("ours", MIXER_JAX, {"backend": "triton"})
    check_backends([candidate], "gpu")
    with raises(UserError, "triton", "GPU"):
        check_backends([Candidate("default", MIXER_JAX), candidate], "cpu")
