"""BiT-HyperRule: hyperparameters of fine-tuning from the size of a dataset and of its images."""

from typing import Any

# Images with a smaller area are shown at the smaller size.
_LARGE_AREA = 96 * 96
# Datasets with fewer examples are small, or else medium-sized.
_SMALL, _MEDIUM = 20_000, 500_000
# Height and width of an image before its random crop, by the size of the crop.
_RESIZE_SIZES = {128: 160, 384: 448, 480: 512}


def bit_hyperrule(
    num_examples: int, image_area: int, large_image_size: int = 384
) -> dict[str, Any]:
    """Returns the config keys that BiT-HyperRule sets (arXiv 1912.11370, Section 3.3).

    Warmup and decay points are those of the released code. The paper does not name a warmup, and
    has the decay points of larger datasets for small ones, too: 30, 60 and 90 % of the steps.

    Args:
        num_examples: Training images.
        image_area: Typical area of the dataset's images, in square pixels.
        large_image_size: Image size for images of 96 × 96 px or more: 384, or 480 as in the paper
            for R152x4 and in the released code for all models.
    """
    image_size = 128 if image_area < _LARGE_AREA else large_image_size
    is_small = num_examples < _SMALL
    num_steps = 500 if is_small else 10_000 if num_examples < _MEDIUM else 20_000
    return {
        "num_steps": num_steps,
        "batch_size": 512,
        "image_size": image_size,
        "preprocess.train_crop": "bilinear_crop",
        "preprocess.resize_size": _RESIZE_SIZES[image_size],
        "preprocess.eval_crop": "resize",
        "recipe.loss": "softmax",
        "recipe.mixup": 0.0 if is_small else 0.1,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.003,
        "optimizer.warmup_steps": 100 if is_small else 500,
        "optimizer.decay_type": "staircase",
        "optimizer.decay_points": "0.4,0.6,0.8" if is_small else "0.3,0.6,0.9",
        "optimizer.clip_norm": 0.0,
    }
