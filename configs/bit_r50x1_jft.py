"""BiT-R50x1 on JFT-300M: 7 epochs at 224 px with Adam (arXiv 2010.11929, Table 3).

    python -m mixer_jax.main --config=configs/bit_r50x1_jft.py --config.dataset.name=YOUR_DATA

Paper:    73.69 % ImageNet top-1 after fine-tuning at 224 px (the Mixer paper, Table 3), 77.54 % at
          384 px (ViT paper, Table 6).
          `:sgd` is the recipe of BiT-L instead (arXiv 1912.11370, Section 3.3), 40 epochs.
Here:     Not reproduced.
Hardware: 0.08k TPU v3 core-days (the Mixer paper).
Data:     JFT-300M is private to Google. Use this recipe for a large dataset of your own, prepared
          for TFDS as array_record; its numbers of classes and examples replace those below.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

RECIPES = ("adam", "sgd")


def get_config(recipe: str = "adam") -> ConfigDict:
    """Builds the config.

    Args:
        recipe: "adam" or "sgd".
    """
    if recipe not in RECIPES:
        raise UserError(f"argument must be {' or '.join(RECIPES)}, got {recipe!r}.")
    config = config_lib.get_default()
    config.model.family = "bit"
    config.model.variant = "R50x1"

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 303_000_000

    config.optimizer.clip_norm = 0.0
    if recipe == "adam":
        config.num_epochs = 7.0
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.1
    else:
        config.num_epochs = 40.0
        # 0.03 per 256 images. The paper's weight decay of 1e-4 is part of the gradient; with
        # momentum 0.9 it shrinks weights like this one, which is multiplied by the learning rate.
        config.optimizer.name = "sgd"
        config.optimizer.learning_rate = 0.48
        config.optimizer.weight_decay = 1e-3
        config.optimizer.warmup_steps = 5_000
        config.optimizer.decay_type = "staircase"
        config.optimizer.decay_points = "10/40,23/40,30/40,37/40"

    config.checkpoint.every_steps = 5_000
    return config
