"""Mixer-S/16 on JFT-300M: 5 epochs at 224 px (Section 3, Appendix B).

    python -m mixer_jax.main --config=configs/mixer_s16_jft.py --config.dataset.name=YOUR_DATA

Paper:    73.83 % ImageNet top-1 after fine-tuning at 224 px (Table 3).
Here:     Not reproduced.
Hardware: 0.03k TPU v3 core-days (paper); TPU slices: docs/plan_results.md.
Data:     JFT-300M is private to Google. Use this recipe for a large dataset of your own, prepared
          for TFDS as array_record; its numbers of classes and examples replace those below.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 5.0
    config.model.variant = "S/16"
    # Users of the authors' code report -10 for this many classes.
    config.model.head_bias = -10.0

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 300_000_000

    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.03

    config.checkpoint.every_steps = 5_000
    return config
