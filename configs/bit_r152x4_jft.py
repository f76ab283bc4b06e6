"""BiT-R152x4 on JFT-300M (BiT-L): 40 epochs at 224 px (arXiv 1912.11370, Section 3.3).

    python -m mixer_jax.main --config=configs/bit_r152x4_jft.py --config.dataset.name=YOUR_DATA

Paper:    87.54 % ImageNet top-1 after fine-tuning at 480 px (the Mixer paper, Table 2).
Here:     Not reproduced.
Hardware: 9.90k TPU v3 core-days (the Mixer paper).
Data:     JFT-300M is private to Google. Use this recipe for a large dataset of your own, prepared
          for TFDS as array_record; its numbers of classes and examples replace those below.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 40.0
    config.model.family = "bit"
    config.model.variant = "R152x4"

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 300_000_000

    # 0.03 per 256 images. The paper's weight decay of 1e-4 is part of the gradient; with momentum
    # 0.9 it shrinks weights like this one, which is multiplied by the learning rate.
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.48
    config.optimizer.weight_decay = 1e-3
    config.optimizer.warmup_steps = 5_000
    config.optimizer.decay_type = "staircase"
    config.optimizer.decay_points = "10/40,23/40,30/40,37/40"
    config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 5_000
    return config
