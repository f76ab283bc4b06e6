"""ViT-B/16 on JFT-300M: 7 epochs at 224 px (arXiv 2010.11929, Table 3).

    python -m mixer_jax.main --config=configs/vit_b16_jft.py --config.dataset.name=YOUR_DATA

Paper:    84.15 % ImageNet top-1 after fine-tuning at 384 px (ViT paper, Table 5).
Here:     Not reproduced.
Hardware: Not stated.
Data:     JFT-300M is private to Google. Use this recipe for a large dataset of your own, prepared
          for TFDS as array_record; its numbers of classes and examples replace those below.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 7.0
    config.model.family = "vit"
    config.model.variant = "B/16"
    config.model.pre_logits = True
    # As in the weights that the authors published, which are from ImageNet-21k.
    config.model.head_bias = -10.0

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 303_000_000

    config.optimizer.learning_rate = 8e-4
    config.optimizer.weight_decay = 0.1
    # The paper clips gradients on ImageNet-1k only.
    config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 5_000
    return config
