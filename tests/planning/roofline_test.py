"""Lower bounds on time and traffic of steps, and run cost: worked examples."""

from typing import Any

import pytest

from mixer_jax.models.family import Traffic
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.registry import get_family
from mixer_jax.planning.hlo_collectives import (
    GRADIENTS,
    MIXUP_EXAMPLES,
    Collective,
    ReplicaGroups,
)
from mixer_jax.planning.roofline import (
    estimate_traffic,
    network_seconds,
    roofline_bound,
    run_cost,
)
from mixer_jax.planning.topology import device_locations, parse_topology

GIGABYTE = 1e9
# Bytes per image, in bfloat16, of the tokens, 196 × 768, and of the hidden units of a token-mixing
# MLP, 768 × 384, and of a channel-mixing MLP, 196 × 3072.
X, TOKENS_HIDDEN, CHANNELS_HIDDEN = 301_056, 589_824, 1_204_224
# Elements of the kernels of 12 blocks with two matmuls each.
TOKENS_KERNELS, CHANNELS_KERNELS = 12 * 2 * 196 * 384, 12 * 2 * 768 * 3072


def all_reduce_seconds(topology_name: str, num_devices: int) -> float:
    """Returns the bound on an all-reduce of a gigabyte over all devices."""
    topology = parse_topology(topology_name)
    groups = (tuple(range(num_devices)),)
    collective = Collective("all-reduce", "f32", "data", GRADIENTS, 1, GIGABYTE, groups)
    return network_seconds(topology, device_locations(topology, None), collective)


def test_network_seconds_of_ring() -> None:
    # Four links per chip, 50 GB/s each.
    assert all_reduce_seconds("v5e:4x4", 16) == pytest.approx(2 * 15 / 16 / 200)


def test_network_seconds_of_chips_with_two_cores() -> None:
    # Four chips, each with one link along each of two axes, 82 GB/s each.
    assert all_reduce_seconds("v3:2x2", 8) == pytest.approx(2 * 3 / 4 / 164)


def test_network_seconds_between_gpu_machines() -> None:
    inside, between = 2 * 7 / 8 / 450, 2 * 1 / 2 / 8 / 50
    assert all_reduce_seconds("h100:16", 16) == pytest.approx(max(inside, between))


@pytest.mark.parametrize(
    ("groups", "bandwidth"), [(((0, 4, 8, 12),), 3.125e9), (((0, 1), (1, 0)), 100e9)]
)
def test_network_seconds_of_permute(groups: ReplicaGroups, bandwidth: float) -> None:
    # Between slices, a group has a device of each; inside of one, its source and its target.
    topology = parse_topology("v5e:2x2", num_slices=4)
    collective = Collective("collective-permute", "u8", "data", MIXUP_EXAMPLES, 1, GIGABYTE, groups)
    seconds = network_seconds(topology, device_locations(topology, None), collective)
    assert seconds == pytest.approx(GIGABYTE / bandwidth)


def test_roofline_bound_and_run_cost() -> None:
    topology = parse_topology("v3:2x2")
    bound = roofline_bound(topology, device_locations(topology, None), 61.5e12, 225e9, [])
    assert bound == (1.0, 0.5, 0.0)
    assert (bound.seconds, bound.serial_seconds, bound.limit) == (1.0, 1.5, "arithmetic")
    cost = run_cost(topology, batch_size=80, num_steps=86_400, model_flops=246e12, step_seconds=1.0)
    assert cost == (80, 20, 1.0, 8.0, 0.5)


def total(traffic: dict[str, Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(*traffic.values(), strict=True)))


def estimate(variant: str = "B/16", batch_size: int = 128, **changes: Any) -> dict[str, Traffic]:
    """Estimates the traffic per step at 224 px with 1,000 classes."""
    family, config = get_family("mixer"), VARIANTS[variant]
    return estimate_traffic(family, config, 224, 1000, batch_size=batch_size, **changes)


def test_estimate_traffic_of_training_step() -> None:
    traffic = estimate()
    assert list(traffic) == [
        *("stem", "token mixing", "channel mixing", "LayerNorm", "head and loss"),
        *("optimizer", "other"),
    ]
    # Each weight is read twice in bfloat16, forward and for the gradient of the input, and its
    # gradient is written in float32. All images share these bytes.
    per_weight = 8 / 128
    tokens, channels = traffic["token mixing"], traffic["channel mixing"]
    assert tokens.flops == 3 * 2 * TOKENS_KERNELS * 768
    assert channels.flops == 3 * 2 * CHANNELS_KERNELS * 196
    tokens_weights, channels_weights = per_weight * TOKENS_KERNELS, per_weight * CHANNELS_KERNELS
    assert tokens.unfused_bytes == 12 * (9 * X + 7 * TOKENS_HIDDEN) + tokens_weights
    assert channels.unfused_bytes == 12 * (9 * X + 7 * CHANNELS_HIDDEN) + channels_weights
    assert tokens.fused_bytes == 12 * 5 * X + tokens_weights
    assert channels.fused_bytes == 12 * 5 * X + channels_weights
    # The image is uint8. The stem's kernel, 16 × 16 × 3 × 768, is read once.
    assert traffic["stem"].unfused_bytes == 2 * (150_528 + X) + 6 * 589_824 / 128
    # The head's kernel is read twice in float32, and its gradient is written.
    assert traffic["head and loss"].unfused_bytes == 3 * X + 12 * 768_000 / 128
    assert traffic["optimizer"].unfused_bytes == 8 * 4 * 59_880_472 / 128
    assert traffic["LayerNorm"] == traffic["other"] == Traffic(0, 0, 0, 0)


def test_estimate_traffic_in_round_numbers() -> None:
    step = total(estimate())
    assert step.flops / 1e9 == pytest.approx(75.4, abs=0.05)
    assert step.unfused_bytes / 1e6 == pytest.approx(236, abs=0.5)
    assert step.fused_bytes / 1e6 == pytest.approx(57, abs=0.5)
    assert step.fused_flops / step.flops == pytest.approx(7 / 6, abs=0.002)
    optimizer = estimate()["optimizer"]
    assert optimizer.unfused_bytes / 1e6 == pytest.approx(15, abs=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_estimate_traffic_of_inference(variant: str) -> None:
    by_region = estimate(variant, train=False)
    infer = total(by_region)
    flops = get_family("mixer").forward_flops(VARIANTS[variant], 224, 1000)
    assert infer.flops == infer.fused_flops == flops
    assert by_region["optimizer"].unfused_bytes == 0
    train = total(estimate(variant))
    # The gradient of the image is not computed.
    assert train.flops == 3 * infer.flops - by_region["stem"].flops
    assert infer.fused_bytes < infer.unfused_bytes < train.unfused_bytes
    assert infer.fused_bytes < train.fused_bytes < train.unfused_bytes


def test_estimate_traffic_shares_parameters_among_images() -> None:
    small, large = (total(estimate(batch_size=batch_size)) for batch_size in (1, 1_000_000))
    assert small.flops == large.flops
    # For one image, most bytes are of parameters: all but those of the head and of biases.
    assert small.unfused_bytes - large.unfused_bytes > (32 + 8) * 59_000_000
    activations = 12 * (18 * X + 7 * (TOKENS_HIDDEN + CHANNELS_HIDDEN))
    assert large.unfused_bytes == pytest.approx(activations, rel=0.02)


def test_estimate_traffic_doubles_in_float32() -> None:
    bfloat16, float32 = (
        total(estimate(batch_size=1_000_000, itemsize=itemsize)) for itemsize in (2, 4)
    )
    assert float32.unfused_bytes / bfloat16.unfused_bytes == pytest.approx(2, rel=0.01)
