"""Mixer-H/14, pre-trained on JFT-300M for 14 epochs at 224 px (paper, Section 3, Appendix B).

Expected, from the paper: 86.32 % ImageNet top-1 after fine-tuning at 224 px (Table 3),
87.94 % at 448 px (Table 2).
Not measured here.

    python -m mixer_jax.main --config=configs/mixer_h14_jft.py --config.dataset.name=YOUR_DATA

Hardware: 1.01k TPU v3 core-days (paper); slices of TPUs: docs/plan_results.md.
On 16 GPUs of 80 GB: with --config.recipe.grad_accum_steps=2.
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
    config.model.variant = "H/14"
    # Users of the authors' code report -10 for this many classes.
    config.model.head_bias = -10.0

    config.dataset.name = "jft300m"
    config.dataset.num_classes = 18_291
    config.dataset.num_examples = 300_000_000

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.03

    config.checkpoint.every_steps = 5_000
    return config
