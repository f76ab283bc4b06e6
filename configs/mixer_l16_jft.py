"""Mixer-L/16, pre-trained on JFT-300M for 14 epochs at 224 px (paper, Section 3, Appendix B).

Expected, from the paper: 84.82 % ImageNet top-1 after fine-tuning at 224 px (Table 3).
Not measured here.
The paper also trained it for 7 epochs: --config.num_epochs=7

    python -m mixer_jax.main --config=configs/mixer_l16_jft.py --config.dataset.name=YOUR_DATA

Hardware: 0.45k TPU v3 core-days (paper).
JFT-300M is private to Google: this is its recipe for a large data set of your own, prepared for
TFDS as array_record. Number of classes and examples come from the data; those below are JFT-300M's.
Without data, to try or to time it: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the config."""
    config = config_lib.get_default()
    config.num_epochs = 14.0
    config.model.variant = "L/16"
    # Users of the authors' code report -10 for this many classes.
    config.model.head_bias = -10.0

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 300_000_000
    # Half of the activations at a time; no product is recomputed and nothing sent twice.
    config.recipe.grad_accum_steps = 2

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.03

    config.checkpoint.every_steps = 5_000
    return config
