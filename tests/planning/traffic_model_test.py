"""Tests of the budget of a step: B/16 worked out by hand, and how parts depend on the work."""

import pytest

from mixer_jax.models.mixer_config import VARIANTS, forward_flops
from mixer_jax.planning.hlo.attribution import REGIONS
from mixer_jax.planning.traffic_model import StepSpec, Traffic, estimate_traffic

B16 = StepSpec(VARIANTS["B/16"], image_size=224, num_classes=1000, batch_size=128)
# Of one image: its tokens, 196 × 768, and the hidden units of a token-mixing MLP, 768 × 384, and of
# one of channel mixing, 196 × 3072, in bfloat16; and kernels of 12 blocks and two products each.
X, TOKENS_HIDDEN, CHANNELS_HIDDEN = 301_056, 589_824, 1_204_224
TOKENS_KERNELS, CHANNELS_KERNELS = 12 * 2 * 196 * 384, 12 * 2 * 768 * 3072


def total(needs: dict[str, Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(*needs.values(), strict=True)))


def test_b16_training_by_hand() -> None:
    needs = estimate_traffic(B16)
    assert list(needs) == list(REGIONS)
    # A kernel is read twice in bfloat16, forward and for the gradient of what goes in; its own
    # gradient is float32. All images share that.
    share = 8 / 128
    tokens, channels = needs["token mixing"], needs["channel mixing"]
    assert tokens.flops == 3 * 2 * TOKENS_KERNELS * 768
    assert channels.flops == 3 * 2 * CHANNELS_KERNELS * 196
    assert tokens.apart == 12 * (9 * X + 7 * TOKENS_HIDDEN) + share * TOKENS_KERNELS
    assert channels.apart == 12 * (9 * X + 7 * CHANNELS_HIDDEN) + share * CHANNELS_KERNELS
    assert tokens.fused == 12 * 5 * X + share * TOKENS_KERNELS
    assert channels.fused == 12 * 5 * X + share * CHANNELS_KERNELS
    # Pixels are bytes; the stem's kernel is read once, of 16 × 16 × 3 × 768.
    assert needs["stem"].apart == 2 * (150_528 + X) + 6 * 589_824 / 128
    # The head's kernel is float32: read twice, its gradient written.
    assert needs["head and loss"].apart == 3 * X + 12 * 768_000 / 128
    assert needs["optimizer"].apart == 8 * 4 * 59_880_472 / 128
    assert needs["LayerNorm"] == needs["other"] == Traffic(0, 0, 0, 0)


def test_b16_in_round_numbers() -> None:
    everything = total(estimate_traffic(B16))
    assert everything.flops / 1e9 == pytest.approx(75.4, abs=0.05)
    assert everything.apart / 1e6 == pytest.approx(236, abs=0.5)
    assert everything.fused / 1e6 == pytest.approx(57, abs=0.5)
    assert everything.flops_fused / everything.flops == pytest.approx(7 / 6, abs=0.002)
    assert estimate_traffic(B16)["optimizer"].apart / 1e6 == pytest.approx(15, abs=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_a_forward_pass(variant: str) -> None:
    work = B16._replace(widths=VARIANTS[variant], training=False)
    needs = estimate_traffic(work)
    everything = total(needs)
    assert everything.flops == everything.flops_fused
    assert everything.flops == forward_flops(VARIANTS[variant], 224, 1000)
    assert needs["optimizer"].apart == 0
    trained = total(estimate_traffic(work._replace(training=True)))
    # All but the gradient of pixels.
    assert trained.flops == 3 * everything.flops - needs["stem"].flops
    assert everything.fused < everything.apart < trained.apart
    assert everything.fused < trained.fused < trained.apart


def test_what_images_share() -> None:
    one, many = (total(estimate_traffic(B16._replace(batch_size=size))) for size in (1, 1_000_000))
    assert one.flops == many.flops
    # Of a single image, parameters are most: all but the head's and those without a kernel.
    assert one.apart - many.apart > (32 + 8) * 59_000_000
    assert many.apart == pytest.approx(
        12 * (18 * X + 7 * (TOKENS_HIDDEN + CHANNELS_HIDDEN)), rel=0.02
    )


def test_float32_is_twice_as_much() -> None:
    many = B16._replace(batch_size=1_000_000)
    low, high = total(estimate_traffic(many)), total(estimate_traffic(many._replace(itemsize=4)))
    assert high.apart / low.apart == pytest.approx(2, rel=0.01)
