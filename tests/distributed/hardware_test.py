"""Tests of the table of chips, and of TPU detection before JAX is imported."""

import fnmatch
import os

import jax
import pytest

from mixer_jax.distributed import hardware
from mixer_jax.distributed.hardware import CHIPS, device_error, get_chip, peak_flops
from mixer_jax.errors import RunError, UserError
from tests.helpers.messages import mentions


def test_get_chip_finds_every_device_kind() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert [get_chip(kind) for kind in chip.device_kinds] == [chip] * len(chip.device_kinds)


@pytest.mark.parametrize("kind", ["cpu", "TPU v1", "TPU v4 lite", "NVIDIA H100", "h100", ""])
def test_peak_flops_of_an_unknown_device_kind_is_none(kind: str) -> None:
    assert get_chip(kind) is None
    assert peak_flops(kind) is None


def test_peak_flops_of_the_devices_of_this_process_is_none() -> None:
    assert peak_flops(jax.devices()[0].device_kind) is None


def test_peak_flops_is_per_device() -> None:
    # JAX counts the two cores of a v3 chip, and the two chiplets of a TPU7x, as devices.
    assert peak_flops("TPU v3") == CHIPS["v3"].flops / 2
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2
    assert peak_flops("TPU v4") == CHIPS["v4"].flops


@pytest.mark.parametrize(
    ("name", "base", "figure", "ratio"),
    [
        # Google on v6e (4.7 times the compute, twice the memory) and v5p (three times the memory).
        ("v6e", "v5e", "flops", 4.7),
        ("v6e", "v5e", "memory_bandwidth", 2),
        ("v6e", "v5e", "memory_gib", 2),
        ("v5p", "v4", "memory_gib", 3),
        # NVIDIA on the H200 (the chip of the H100 with other memory) and the larger A100.
        ("h200", "h100", "flops", 1),
        ("h200", "h100", "memory_bandwidth", 1.4),
        ("a100-80", "a100-40", "memory_gib", 2),
        ("a100-80", "a100-40", "memory_bandwidth", 1.3),
    ],
)
def test_figures_have_the_published_ratios(name: str, base: str, figure: str, ratio: float) -> None:
    actual = getattr(CHIPS[name], figure) / getattr(CHIPS[base], figure)
    assert actual == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("name", CHIPS)
def test_figures_of_a_chip_are_consistent(name: str) -> None:
    """A wrong unit or a figure per device is off by a factor of two or more."""
    chip = CHIPS[name]
    # FLOP per byte at which compute and memory take the same time.
    assert 60 < chip.flops / chip.memory_bandwidth < 600
    # Every chip of the table reads its memory once in 20 to 41 ms.
    memory_bytes = chip.memory_gib * 2**30 * chip.devices_per_chip
    assert 0.019 < memory_bytes / chip.memory_bandwidth < 0.042
    # Memory is faster than all links together, which are faster than the network.
    links = chip.link_bandwidth * (2 * chip.torus_dims if chip.is_tpu else 1)
    assert 2 < chip.memory_bandwidth / links < 13
    assert chip.network_bandwidth is None or chip.network_bandwidth * 4 < links
    # A slice of TPUs is connected by a torus, a machine of GPUs by switches.
    assert chip.platform == ("tpu" if "TPU" in chip.device_kinds[0] else "gpu")
    assert chip.is_tpu == (chip.nvlink_domain == 0)


@pytest.mark.parametrize(
    ("name", "total"), [("v5e", 200e9), ("v5p", 600e9), ("v6e", 400e9), ("tpu7x", 600e9)]
)
def test_links_sum_to_half_of_the_documented_bidirectional_bandwidth(
    name: str, total: float
) -> None:
    assert CHIPS[name].link_bandwidth * 2 * CHIPS[name].torus_dims == total


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], False),
        # Many hosts without a TPU have the control node of VFIO.
        (["/dev/vfio/vfio"], False),
        (["/dev/accel0"], True),
        (["/dev/vfio/vfio", "/dev/vfio/0"], True),
    ],
)
def test_has_tpu_counts_numbered_devices_only(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], expected: bool
) -> None:
    monkeypatch.setattr(hardware.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    assert hardware.has_tpu() == expected


@pytest.mark.parametrize("has_tpu", [False, True])
def test_silence_libtpu_keeps_the_settings_of_the_user_and_of_real_tpus(
    monkeypatch: pytest.MonkeyPatch, has_tpu: bool
) -> None:
    monkeypatch.setattr(hardware, "has_tpu", lambda: has_tpu)
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    hardware.silence_libtpu()
    assert os.environ.pop("TPU_WORKER_HOSTNAMES") == "mine"
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (not has_tpu)
    assert bool(os.environ) == (not has_tpu)


# Messages of JAX 0.10 start with "Unable to initialize backend 'PLATFORM': ".
@pytest.mark.parametrize(
    ("message", "is_absent"),
    [
        ("Backend 'tup' is not in the list of known backends: ['cpu', 'tpu'].", True),
        ("NOT_FOUND: TPU initialization failed: No jellyfish device found.", True),
        ("FAILED_PRECONDITION: No visible GPU devices.", True),
        # A bare assertion, also as a worker process summarizes it.
        ("", True),
        ("AssertionError", True),
        ("ABORTED: The TPU is already in use by process with pid 41.", False),
        ("INTERNAL: CUDA error: Failed call to cuDeviceGet: CUDA_ERROR_OUT_OF_MEMORY", False),
        ("Segmentation fault", False),
    ],
)
def test_device_error_is_a_usage_error_only_if_devices_are_absent(
    message: str, is_absent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = " (set JAX_PLATFORMS='' to automatically choose an available backend)"
    text = message + hint if " " in message else message
    monkeypatch.setenv("JAX_PLATFORMS", "tup,cpu")
    error = device_error(text)
    assert type(error) is (UserError if is_absent else RunError)
    assert mentions(str(error), "JAX_PLATFORMS", "tup,cpu") == is_absent
    # Without the variable, the user has not named any device.
    monkeypatch.delenv("JAX_PLATFORMS")
    error = device_error(text)
    assert type(error) is RunError
    assert "(set JAX_PLATFORMS" not in str(error)
    assert " " not in message or mentions(str(error), message.rstrip("."))
