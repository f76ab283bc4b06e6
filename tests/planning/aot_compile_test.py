"""Errors of the TPU compiler about programs that do not fit into memory."""

import pytest

from mixer_jax.planning.aot_compile import OutOfMemory, parse_oom
from mixer_jax.planning.topology import GIB
from tests.helpers.messages import raises

PREFIX = "RESOURCE_EXHAUSTED: "


@pytest.mark.parametrize(
    ("message", "needed_gib", "excludes_arguments"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (34.87G) "
            "exceeds available HBM (15.75G).",
            34.87,
            True,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.08G "
            "of 15.75G hbm. Exceeds hbm capacity by 1.33G.",
            17.08,
            False,
        ),
    ],
)
def test_parse_oom(message: str, needed_gib: float, excludes_arguments: bool) -> None:
    oom = parse_oom(RuntimeError(PREFIX + message), 3.0)
    assert oom == OutOfMemory(3.0, needed_gib * GIB, 15.75 * GIB, "", excludes_arguments)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space vmem. Used 17.08M of 16.00M vmem. Exceeded vmem "
        "capacity by 1.08M.",
        "A message that is not known.",
    ],
)
def test_parse_oom_keeps_other_messages(message: str) -> None:
    oom = parse_oom(RuntimeError(PREFIX + message), 3.0)
    # Without its full stop, since the message becomes part of a sentence.
    assert oom == OutOfMemory(3.0, None, 0.0, PREFIX + message.removesuffix("."), False)


def test_parse_oom_raises_other_errors() -> None:
    with raises(RuntimeError, "broken"):
        parse_oom(RuntimeError("INTERNAL: broken"), 0.0)
