"""Tests of the table of chips."""

import pytest

from mixer_jax.distributed.hardware import CHIPS, get_chip, peak_flops


def test_peaks_are_of_devices() -> None:
    assert peak_flops("TPU v4") == 275e12
    assert peak_flops("TPU v3") == 123e12 / 2
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_every_device_kind_has_one_chip() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    for chip in CHIPS.values():
        assert [get_chip(kind) for kind in chip.kinds] == [chip] * len(chip.kinds)


@pytest.mark.parametrize("name", CHIPS)
def test_numbers_are_of_one_scale(name: str) -> None:
    chip = CHIPS[name]
    # A slip in a unit would be a factor of 8, 1,000 or more.
    assert 40e12 < chip.flops < 3e15
    assert 7 < chip.memory_gib < 200
    assert 50 < chip.flops / chip.memory_bandwidth < 600
    assert 2 < chip.memory_bandwidth / chip.link_bandwidth / max(1, 2 * chip.axes) < 13
    assert chip.network_bandwidth is None or chip.network_bandwidth < chip.link_bandwidth
    assert chip.source


@pytest.mark.parametrize(
    ("name", "egress"), [("v5e", 200e9), ("v5p", 600e9), ("v6e", 400e9), ("tpu7x", 600e9)]
)
def test_links_add_up_to_what_is_documented(name: str, egress: float) -> None:
    # Half of the bidirectional bandwidth of all links of a chip.
    assert CHIPS[name].link_bandwidth * 2 * CHIPS[name].axes == egress
