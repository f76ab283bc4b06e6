"""Mixup and CutMix: pairs of examples, random weights, and mixed images and targets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.models.layers import normalize_images


class ExamplePairs(NamedTuple):
    """Examples of a batch and their partners, before mixing; no partners without mixup and CutMix.

    Attributes:
        images: Images.
        partner_images: Images of the partners, or None.
        targets: Targets of the loss.
        partner_targets: Targets of the partners, or None.
    """

    images: UInt8[Array, "n h w 3"]
    partner_images: UInt8[Array, "n h w 3"] | None
    targets: Float[Array, "n classes"]
    partner_targets: Float[Array, "n classes"] | None


class MixupWeights(NamedTuple):
    """Weights of all examples of a batch; those of their partners are 1 minus these.

    Attributes:
        target: Weight of an example's target, λ.
        pixels: Weight of each pixel of its image; CutMix: 0 in the box and 1 outside. None: λ.
    """

    target: Float[Array, ""]
    pixels: Float[Array, "1 h w 1"] | None = None


def sample_mixup(
    rng: Key[Array, ""],
    images: UInt8[Array, "n h w 3"],
    targets: Float[Array, "n classes"],
    recipe: RecipeConfig,
) -> tuple[ExamplePairs, MixupWeights | None]:
    """Pairs the examples of a batch, and samples the weights that mixup or CutMix mixes them with.

    The partners are the batch rolled by one (the authors' code). The whole batch is rolled, as
    uint8; mixing follows per microbatch, in float32.

    Mixup's weight is λ = max(b, 1−b), b from Beta(p, p). BiT takes b itself (arXiv 1912.11370).
    That trains the same model: with weight 1−λ, a batch becomes the mixtures that its reverse
    becomes with weight λ, and the order of a batch is random.

    Returns:
        The pairs, and their weights; no partners and no weights if the recipe mixes nothing.
    """
    if not (recipe.mixup or recipe.cutmix):
        return ExamplePairs(images, None, targets, None), None
    sample = jax.random.beta(rng, recipe.mixup, recipe.mixup) if recipe.mixup else jnp.ones(())
    rolled_images, rolled_targets = jnp.roll(images, 1, axis=0), jnp.roll(targets, 1, axis=0)
    pairs = ExamplePairs(images, rolled_images, targets, rolled_targets)
    weights = MixupWeights(jnp.maximum(sample, 1.0 - sample))
    if recipe.cutmix:
        # The first two keys that are derived from `rng` are those of mixup's Beta distribution.
        cutmix_rng, (height, width) = jax.random.fold_in(rng, 2), images.shape[1:3]
        weights = sample_cutmix(cutmix_rng, weights.target, height, width, recipe)
    return pairs, weights


def sample_cutmix(
    rng: Key[Array, ""],
    mixup_weight: Float[Array, ""],
    height: int,
    width: int,
    recipe: RecipeConfig,
) -> MixupWeights:
    """Samples CutMix's weights, or keeps those of mixup in the steps that use mixup.

    If a recipe has both, a step uses CutMix with probability `mixup_switch_prob`, as in timm.
    """
    mask_rng, switch_rng = jax.random.split(rng)
    mask = sample_cutmix_mask(mask_rng, height, width, recipe.cutmix)
    use_cutmix = jax.random.bernoulli(switch_rng, recipe.mixup_switch_prob if recipe.mixup else 1.0)
    return MixupWeights(
        target=jnp.where(use_cutmix, jnp.mean(mask), mixup_weight),
        pixels=jnp.where(use_cutmix, mask, mixup_weight),
    )


def sample_cutmix_mask(
    rng: Key[Array, ""], height: int, width: int, alpha: float
) -> Float[Array, "1 h w 1"]:
    """Samples CutMix's mask, which is 0 in a box and 1 outside (arXiv 1905.04899, Section 3.1).

    Sides of the box are √(1−λ) of those of the image, λ from Beta(alpha, alpha), and its center is
    uniform. Where it extends beyond the image it is clipped, so that the mean of the mask may be
    larger than λ. Targets are weighted by that mean (the authors' code).
    """
    lambda_rng, *center_rngs = jax.random.split(rng, 3)
    fraction = jnp.sqrt(1.0 - jax.random.beta(lambda_rng, alpha, alpha))

    def sample_interval(rng: Key[Array, ""], length: int) -> Bool[Array, " length"]:
        size = jnp.int32(length * fraction)
        start = jax.random.randint(rng, (), 0, length) - size // 2
        index = jnp.arange(length)
        return (start <= index) & (index < start + size)

    rows, columns = map(sample_interval, center_rngs, (height, width))
    in_box = rows[:, None] & columns[None, :]
    return jnp.where(in_box, 0.0, 1.0)[None, :, :, None]


def apply_mixup(
    pairs: ExamplePairs, weights: MixupWeights | None
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n classes"]]:
    """Mixes images, normalized to [-1, 1], and targets with those of their partners, if any."""
    images, partner_images, targets, partner_targets = pairs
    if weights is None:
        return normalize_images(images), targets
    assert partner_images is not None
    assert partner_targets is not None
    weight = weights.target if weights.pixels is None else weights.pixels
    mixed = weight * normalize_images(images) + (1.0 - weight) * normalize_images(partner_images)
    return mixed, weights.target * targets + (1.0 - weights.target) * partner_targets
